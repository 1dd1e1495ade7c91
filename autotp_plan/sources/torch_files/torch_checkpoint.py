"""`pytorch_model.bin`, or its index and the files that it names, as the safetensors checkpoint they could have been."""

from __future__ import annotations

import concurrent.futures
import json
import re
from collections.abc import Mapping
from pathlib import Path

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.checkpoint import (
    INDEX_NAME,
    NOTHING_ELSEWHERE,
    SINGLE_NAME,
    Checkpoint,
    checkpoint_of,
    read_weight_map,
)
from autotp_plan.schemas.storage.files import MadeFile, StoredFile

TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"


def holds_torch_tensors(folder: Path, elsewhere: Mapping[str, StoredFile] = NOTHING_ELSEWHERE) -> bool:
    """Whether `folder` has files of `torch.save` of a model, as `read_torch_checkpoint` reads them."""
    return (folder / TORCH_NAME).exists() or (folder / TORCH_INDEX_NAME).exists() or TORCH_NAME in elsewhere


def read_torch_checkpoint(folder: Path, elsewhere: Mapping[str, StoredFile] = NOTHING_ELSEWHERE) -> Checkpoint:
    """The checkpoint in the `.bin` files of a folder, under the names of safetensors files; no tensor is read.

    Args:
        folder: holds `pytorch_model.bin`, or `pytorch_model.bin.index.json` and the files that it names; of both the
            first is read, as `from_pretrained` does.
        elsewhere: files that are not in the folder, by name.

    Raises:
        CheckpointError: a file is missing, broken, holds other things than tensors or not what the index says.
        DocumentError: the index is not JSON.
    """
    from autotp_plan.sources.torch_files.torch_file import read_torch_file  # a folder of safetensors does not need it

    if (folder / TORCH_NAME).exists() or TORCH_NAME in elsewhere:
        single = read_torch_file(elsewhere.get(TORCH_NAME) or folder / TORCH_NAME, SINGLE_NAME)
        return checkpoint_of(folder, (single,), None, {})
    weight_map = read_weight_map(folder / TORCH_INDEX_NAME)
    names = {name: _safetensors_name(name) for name in sorted(set(weight_map.values()))}
    if len(set(names.values())) < len(names):
        raise CheckpointError(_same_name(folder / TORCH_INDEX_NAME, names))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = lambda name: read_torch_file(elsewhere.get(name) or folder / name, names[name])  # noqa: E731
        files = tuple(sorted(pool.map(read, names), key=lambda file: file.path.name))
    renamed = {tensor: names[name] for tensor, name in weight_map.items()}
    total = sum(tensor.stop - tensor.start for file in files for tensor in file.tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(renamed.items()))}, indent=2) + "\n"
    return checkpoint_of(folder, files, MadeFile(INDEX_NAME, text.encode("utf-8")), renamed)


def _safetensors_name(name: str) -> str:
    """`model-00001-of-00002.safetensors` for `pytorch_model-00001-of-00002.bin`."""
    return re.sub(r"^pytorch_model", "model", name.removesuffix(".bin")) + ".safetensors"


def _same_name(index: Path, names: Mapping[str, str]) -> Fault:
    found = list(names.values())
    return Fault(
        code="torch-file-names",
        what="two files of torch.save would be one safetensors file",
        where=str(index),
        got=", ".join(name for name, to in names.items() if found.count(to) > 1),
        expected="names that differ in more than pytorch_ before and .bin after them",
        next="rename one of the files, in the index too",
    )
