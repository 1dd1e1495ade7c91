"""A quantised checkpoint as it would be if it had been saved with plain weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from autotp_plan.dequantize.computed_file import ComputedFile, Weights
from autotp_plan.dequantize.formats import SCALE_ENDINGS, Found, find_quantized
from autotp_plan.dequantize.settings import refused, settings_of
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.names import starred
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, without_quantization
from autotp_plan.schemas.storage.files import MadeFile
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, described_file

DTYPES = ("BF16", "F16", "F32")
DEFAULT_DTYPE = "BF16"


def plain_checkpoint(checkpoint: Checkpoint, dtype: str = DEFAULT_DTYPE) -> Checkpoint:
    """A checkpoint whose weights are plain.

    Args:
        checkpoint: as it lies on disk.
        dtype: what weights become that are quantised: one of `DTYPES`.

    Returns:
        Where nothing is quantised the checkpoint itself. Else one whose files have the weights in place of their codes,
        computed when they are read, and no scales; its config.json and index say so.

    Raises:
        CheckpointError: it is quantised in a way that is not understood, or scales are missing or do not fit.
    """
    settings = settings_of(checkpoint.config, checkpoint.folder)
    if settings is None:
        scales = sorted({starred(name) for name in checkpoint.tensors if name.endswith(SCALE_ENDINGS)})
        if scales:
            raise refused(checkpoint.folder, f"tensors such as {scales[0]}, and no quantization_config in config.json")
        return checkpoint
    book = FaultBook()
    found = find_quantized(checkpoint.tensors, settings, book)
    book.raise_if_any(CheckpointError)
    weights = Weights(dtype)
    files = tuple(_computed(file, found, weights) for file in checkpoint.files) if found.weights else checkpoint.files
    files = tuple(file for file in files if file.tensors)
    return dataclasses.replace(
        checkpoint,
        files=files,
        tensors={tensor.name: tensor for file in files for tensor in file.tensors},
        config=without_quantization(checkpoint.config or {}),
        index=None if checkpoint.index is None else _index(files),
        dequantize=settings.dequantization(dtype) if found.weights else None,
        config_file=_config(checkpoint.folder / CONFIG_NAME),
        files_on_disk=checkpoint.files,
    )


def _computed(file: SafetensorsFile, found: Found, weights: Weights) -> SafetensorsFile:
    """A file with weights in place of their codes, and without scales."""
    kept = [tensor for tensor in file.tensors if tensor.name not in found.dropped]
    if len(kept) == len(file.tensors) and not any(tensor.name in found.weights for tensor in kept):
        return file
    sources = [found.weights.get(tensor.name, tensor) for tensor in kept]
    described = [
        (source.name, weights.dtype if tensor.name in found.weights else tensor.dtype, source.shape)
        for source, tensor in zip(sources, kept)
    ]
    computed = ComputedFile(file.path, weights)
    made = described_file(computed, described, file.metadata or {})
    computed.fill(made, sources)
    return made


def _config(path: Path) -> MadeFile:
    """The config.json of the plain checkpoint."""
    return _json_file(CONFIG_NAME, without_quantization(json.loads(path.read_text(encoding="utf-8"))))


def _index(files: tuple[SafetensorsFile, ...]) -> MadeFile:
    """The index of the plain checkpoint."""
    weight_map: dict[str, str] = {}
    for file in files:
        weight_map.update(dict.fromkeys((tensor.name for tensor in file.tensors), file.path.name))
    size = sum(tensor.stop - tensor.start for file in files for tensor in file.tensors)
    return _json_file(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _json_file(name: str, content: object) -> MadeFile:
    return MadeFile(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
