"""A Hugging Face checkpoint folder: which safetensors file holds which tensor, and its config.json.

Reads headers and JSON only. It knows nothing of modules: tensor names are those on disk.
"""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.plan.entries import Dequantization
from autotp_plan.schemas.storage.files import File, StoredFile
from autotp_plan.schemas.storage.safetensors_header import (
    MAX_TENSORS,
    SafetensorsFile,
    TensorEntry,
    read_header,
    too_many_tensors,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_NOT_HASHED = frozenset(
    {"_name_or_path", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version"}
    | {"auto_map", "use_cache"}
)
"""Keys of config.json that no layout depends on, and that differ between checkpoints of one architecture."""

QUANTIZATION = "quantization_config"
_TEXT = "text_config"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The files of a checkpoint in name order, its tensors by name, and its config.json.

    `index` says which tensor is in which file; None where there is one file and no index. `notes` say what a user might
    not expect of the files that were chosen. `dequantize` says how weights are quantised on disk that are plain here;
    then `config_file` is the config.json to copy, and not that of the folder, and `files_on_disk` are the files as they
    lie.
    """

    folder: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any] | None
    index: File | None = None
    notes: tuple[str, ...] = ()
    dequantize: Dequantization | None = None
    config_file: File | None = None
    files_on_disk: tuple[SafetensorsFile, ...] = ()


NOTHING_ELSEWHERE: Mapping[str, StoredFile] = {}


def holds_tensors(folder: Path, elsewhere: Mapping[str, StoredFile] = NOTHING_ELSEWHERE) -> bool:
    """Whether `folder` has safetensors files of a model, as `read_checkpoint` reads them."""
    return _has_single(folder, elsewhere) or (folder / INDEX_NAME).exists()


def _has_single(folder: Path, elsewhere: Mapping[str, StoredFile]) -> bool:
    return (folder / SINGLE_NAME).exists() or SINGLE_NAME in elsewhere


def read_checkpoint(folder: Path, elsewhere: Mapping[str, StoredFile] = NOTHING_ELSEWHERE) -> Checkpoint:
    """The checkpoint in a folder: headers are read, tensors are not.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names; of both the
            first is read, as `from_pretrained` does. Files may be symbolic links, as in a download cache.
        elsewhere: files that are not in the folder, by name.

    Raises:
        CheckpointError: a file is missing, broken or does not hold what the index says.
        DocumentError: the index is not JSON.
    """
    weight_map: dict[str, str] | None = None
    if _has_single(folder, elsewhere):
        names = [SINGLE_NAME]
    elif (folder / INDEX_NAME).exists():
        weight_map = read_weight_map(folder / INDEX_NAME)
        names = sorted(set(weight_map.values()))
    else:
        raise CheckpointError(no_weights(folder))
    with concurrent.futures.ThreadPoolExecutor(32 if elsewhere else 8) as pool:
        files = tuple(pool.map(lambda name: read_header(elsewhere.get(name) or folder / name), names))
    return checkpoint_of(folder, files, None if weight_map is None else folder / INDEX_NAME, weight_map or {})


def checkpoint_of(
    folder: Path, files: tuple[SafetensorsFile, ...], index: File | None, weight_map: Mapping[str, str]
) -> Checkpoint:
    """The checkpoint that files make up.

    Args:
        folder: where they are; it may have a config.json.
        files: in name order.
        index: where `weight_map` is from; None for a single file.
        weight_map: file names by tensor name.

    Raises:
        CheckpointError: a tensor is in two files, or not in the one that the index names; or there are too many.
        DocumentError: config.json is not JSON.
    """
    if sum(len(file.tensors) for file in files) > MAX_TENSORS:
        raise too_many_tensors(folder)
    tensors: dict[str, TensorEntry] = {}
    faults: list[Fault] = []
    for file in files:
        for tensor in file.tensors:
            if tensor.name in tensors:
                faults.append(_index_fault(file.path, f"{tensor.name}, also in {tensors[tensor.name].file.name}"))
            tensors[tensor.name] = tensor
    if index is not None:
        faults.extend(_index_faults(index, weight_map, tensors))
    if faults:
        raise CheckpointError(faults)
    return Checkpoint(folder=folder, files=files, tensors=tensors, config=read_config(folder), index=index)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The parsed config.json of a folder; None when there is none. `Infinity` is `{"__float__": "Infinity"}` in it.

    Raises:
        DocumentError: it is not JSON.
        CheckpointError: it is JSON, but not an object.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return None
    config = documents.read_json(path, "config.json", special_floats=True, plain=True)
    if not isinstance(config, dict):
        raise CheckpointError(
            Fault(
                code="config-not-object",
                what="config.json is not a JSON object",
                where=str(path),
                got=type(config).__name__,
                expected="an object, as transformers writes it",
                next="fetch the file again",
            )
        )
    return config


def planned_config(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """A config without the keys that no layout depends on, keys in order, as a plan holds it; None for no config."""
    if config is None:
        return None
    kept = {key: value for key, value in without_quantization(config).items() if key not in _NOT_HASHED}
    ordered: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True))
    return ordered


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as that of a checkpoint whose weights are not quantised."""
    plain = {key: value for key, value in config.items() if key != QUANTIZATION}
    text = plain.get(_TEXT)
    if isinstance(text, dict) and QUANTIZATION in text:
        plain[_TEXT] = {key: value for key, value in text.items() if key != QUANTIZATION}
    return plain


def quantization_of(config: Mapping[str, Any] | None) -> Any:
    """`quantization_config` of a config, or of its text model; None for neither."""
    text = (config or {}).get(_TEXT)
    return (config or {}).get(QUANTIZATION) or (text.get(QUANTIZATION) if isinstance(text, Mapping) else None)


def config_hash(config: dict[str, Any] | None) -> str | None:
    """Hash of what a plan holds of a config; None for no config."""
    return None if config is None else documents.fingerprint(planned_config(config))


def read_weight_map(path: Path) -> dict[str, str]:
    """File names by tensor name, of an index.

    Raises:
        CheckpointError: it has none, or names files outside of the folder.
        DocumentError: it is not JSON.
    """
    index = documents.read_json(path, "checkpoint index", plain=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(_index_fault(path, "no weight_map of file names by tensor name"))
    outside = sorted(
        {name for name in set(weight_map.values()) if Path(name).name != name or name in ("", "..") or "\0" in name}
    )
    if outside:
        raise CheckpointError([_index_fault(path, f"{name}, which is not a file of this folder") for name in outside])
    return weight_map


def _index_faults(index: File, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> Iterator[Fault]:
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            yield _index_fault(index, f"{name}, which is not in {file_name}")
    for name in tensors.keys() - weight_map.keys():
        yield _index_fault(tensors[name].file, f"{name}, which the index does not name")


def _index_fault(where: File, got: str) -> Fault:
    return Fault(
        code="index-differs",
        what="the checkpoint's index and files disagree",
        where=str(where),
        got=got,
        expected="every tensor in exactly the file that the index names",
        next="fetch or save the checkpoint again",
    )


def no_weights(folder: Path) -> Fault:
    """The fault of a folder without weights that can be read."""
    if not folder.is_dir():
        got = "no such folder" if not folder.exists() else "a file"
    else:
        other = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        got = ", ".join(other[:3]) or "a folder without weights"
    return Fault(
        code="no-checkpoint",
        what="there is no safetensors checkpoint here",
        where=str(folder),
        got=got,
        expected=f"{SINGLE_NAME}, or {INDEX_NAME} and the files it names; or pytorch_model.bin",
        next="give the folder that save_pretrained wrote; a state dict that torch.save wrote under another name must "
        "be called pytorch_model.bin",
    )
