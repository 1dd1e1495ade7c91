"""Which of a folder's files hold the model: what `from_pretrained` would read, and what is left unread.

transformers takes the first that is there of model.safetensors, its index, pytorch_model.bin, and its index
(`_get_resolved_checkpoint_files` in transformers/modeling_utils.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.names import some
from autotp_plan.schemas.plan.entries import NOT_READ
from autotp_plan.schemas.storage.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    holds_tensors,
    no_weights,
    read_checkpoint,
)
from autotp_plan.schemas.storage.files import File, StoredFile
from autotp_plan.sources.torch_files.torch_checkpoint import (
    TORCH_INDEX_NAME,
    TORCH_NAME,
    holds_torch_tensors,
    read_torch_checkpoint,
)

ADAPTER_NAME = "adapter_config.json"
EXPLICIT_KEY = "transformers_weights"

_WEIGHTS = re.compile(r".+\.(safetensors|bin|pt|pth|gguf)|.+\.index(\.[^.]+)?\.json")
_NO_MODEL = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)\b.*")
"""Files that a trainer leaves in the folder of a model."""
_VARIANT = re.compile(r"(model|pytorch_model)\.[^.]+(-\d+-of-\d+)?\.(safetensors|bin)|.*\.index\.[^.]+\.json")


def holds_weights(folder: Path, elsewhere: Mapping[str, StoredFile]) -> bool:
    """Whether a folder has files that `read_weights` reads."""
    return holds_tensors(folder, elsewhere) or holds_torch_tensors(folder, elsewhere)


def read_weights(folder: Path, elsewhere: Mapping[str, StoredFile], config: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint that `from_pretrained` would read of a folder; no tensor is read.

    Args:
        folder: where the files are.
        elsewhere: files that are not in the folder, by name.
        config: its config.json.

    Raises:
        CheckpointError: there is none, it cannot be read, or the folder asks for other weights than those in it.
        DocumentError: the index is not JSON.
    """
    if (folder / ADAPTER_NAME).exists():
        raise CheckpointError(_adapter(folder))
    _refuse_explicit(folder, elsewhere, (config or {}).get(EXPLICIT_KEY))
    if holds_tensors(folder, elsewhere):
        checkpoint = read_checkpoint(folder, elsewhere)
    elif holds_torch_tensors(folder, elsewhere):
        checkpoint = read_torch_checkpoint(folder, elsewhere)
    else:
        raise CheckpointError(_other_weights(folder, elsewhere) or no_weights(folder))
    chosen = _chosen(folder, elsewhere)
    read = {str(chosen), *(_name_on_disk(file.path) for file in checkpoint.files)}
    left = unread_weights(folder, elsewhere, read)
    if not left:
        return checkpoint
    note = f"The weights are read from {chosen}, as from_pretrained does.{NOT_READ}{left}."
    return dataclasses.replace(checkpoint, notes=(note,))


def unread_weights(folder: Path, elsewhere: Mapping[str, StoredFile], read: Collection[str] = ()) -> str:
    """The names of a folder's weights that are not among those `read`, the first of them; empty where all are."""
    left = [name for name in _weights_in(folder, elsewhere) if name not in read]
    return some(left)


def _chosen(folder: Path, elsewhere: Mapping[str, StoredFile]) -> str | None:
    names = (SINGLE_NAME, INDEX_NAME, TORCH_NAME, TORCH_INDEX_NAME)
    return next((name for name in names if name in elsewhere or (folder / name).exists()), None)


def _name_on_disk(file: File) -> str:
    if isinstance(file, Path):
        return file.name
    from autotp_plan.sources.torch_files.torch_view import TorchFile

    return _name_on_disk(file.file) if isinstance(file, TorchFile) else file.name


def _weights_in(folder: Path, elsewhere: Mapping[str, StoredFile]) -> list[str]:
    """The files of a folder that hold weights of a model, and their indices, in name order."""
    here = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    names = sorted(name for name in {*here, *elsewhere} if not name.startswith("."))
    return [name for name in names if _WEIGHTS.fullmatch(name) and not _NO_MODEL.fullmatch(name)]


def _refuse_explicit(folder: Path, elsewhere: Mapping[str, StoredFile], named: Any) -> None:
    chosen = _chosen(folder, elsewhere)
    if named in (None, chosen):
        return
    raise CheckpointError(
        Fault(
            code="explicit-weights",
            what=f"config.json names a file of weights in {EXPLICIT_KEY}, which is not read here",
            where=str(folder / CONFIG_NAME),
            got=str(named)[:200],
            expected=f"no {EXPLICIT_KEY}, and {SINGLE_NAME} or {INDEX_NAME} in the folder",
            next=f"make a folder with that file as {SINGLE_NAME} (an index as {INDEX_NAME}), and a config.json without "
            f"{EXPLICIT_KEY}",
        )
    )


def _adapter(folder: Path) -> Fault:
    return Fault(
        code="adapter-folder",
        what="this folder holds an adapter, and from_pretrained would load its base model from elsewhere",
        where=str(folder / ADAPTER_NAME),
        got=ADAPTER_NAME,
        expected="the weights of a full model",
        next="merge the adapter into the base model (merge_and_unload and save_pretrained of peft), or, where the "
        f"weights in the folder are the full model, remove {ADAPTER_NAME}",
    )


def _other_weights(folder: Path, elsewhere: Mapping[str, StoredFile]) -> Fault | None:
    """The fault of a folder with weights that `from_pretrained` reads only when it is asked to, or not at all."""
    names = _weights_in(folder, elsewhere)
    variants = [name for name in names if _VARIANT.fullmatch(name)]
    if variants:
        return Fault(
            code="variant-weights",
            what="the only weights in this folder are of a variant",
            where=str(folder),
            got=", ".join(variants[:3]),
            expected=f"{SINGLE_NAME}, or {INDEX_NAME} and the files it names",
            next="give the index, or the single file, the name without the variant: model.safetensors for "
            "model.fp16.safetensors, model.safetensors.index.json for model.safetensors.index.fp16.json",
        )
    if any(name.startswith("consolidated") for name in names):
        return Fault(
            code="consolidated-weights",
            what="the only weights in this folder are not transformers' but those of the model's authors",
            where=str(folder),
            got=", ".join(name for name in names if name.startswith("consolidated")),
            expected=f"{SINGLE_NAME}, or {INDEX_NAME} and the files it names",
            next="fetch the model's files for transformers (model*.safetensors): its tensors have other names there",
        )
    return None
