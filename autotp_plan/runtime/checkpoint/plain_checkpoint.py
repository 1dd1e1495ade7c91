"""A sharded model written as a plain Hugging Face checkpoint: the files that an unsharded model would save.

The first rank writes them, as it does for a model that is not sharded; every rank sends it what it holds, tensor by
tensor. Which tensors there are, and where each lies, is known before one is gathered.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from autotp_plan.runtime.checkpoint.full_tensors import FullTensor, FullTensors
from autotp_plan.runtime.checkpoint.save_shards import original_of
from autotp_plan.runtime.deepspeed.agreement import in_step, together
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.loading.read_weights import CHUNK_BYTES
from autotp_plan.runtime.loading.weights import DTYPES
from autotp_plan.runtime.optimizers.finite import count_nonfinite, warn_of_nonfinite
from autotp_plan.schemas.documents import make_folder
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.origin import Original
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from autotp_plan.schemas.storage.safetensors_header import header_bytes, num_bytes, parse_header
from autotp_plan.schemas.untrusted.plain_files import sync_file, sync_folder, write_atomically
from autotp_plan.sources.model_folder import ModelFolder

ENDING = ".safetensors"
_ASIDE = ".autotp_config"
"""Inside the folder: where the small files are written, before they take the place of those of an earlier save."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of the checkpoint: elements from `start` on of a flattened tensor of the model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def save_plain_checkpoint(
    model: nn.Module,
    folder: Path,
    plan: Plan,
    ranks: Ranks,
    source: ModelFolder | Original,
    *,
    weights_name: str = SINGLE_NAME,
    index_name: str = INDEX_NAME,
    max_file_bytes: int | str = "50GB",
    original_names: bool = True,
    write_config: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the weights of a sharded model under the names that transformers reads. Every rank calls it.

    Args:
        model: a model from `load_model`.
        folder: where the first rank writes. Files of an earlier save are replaced.
        plan: the plan that the model is sharded by.
        ranks: this process's place in the mesh.
        source: the checkpoint or shards folder that the model came from, or what was kept of it; headers are read where
            several tensors on disk make up one parameter.
        weights_name: the name of the file, which is numbered where there are several.
        index_name: the name of the index where there are several.
        max_file_bytes: a file has at most as many bytes of tensors, or one tensor; a number, or as in "5GB".
        original_names: the names that the checkpoint has, not those of the modules.
        write_config: writes what else belongs to the checkpoint into a folder; called on the first rank.

    Raises:
        OutputError: the first rank cannot write. As all errors, the same on every rank.
        MismatchError: the model has other parameters than the plan; or not every rank calls it.
    """
    full = FullTensors(model, ranks, call="model.save_pretrained")
    is_first = torch.distributed.get_rank() == 0

    def begin() -> _Writer | None:
        parameters = {parameter.name: parameter for parameter in plan.expanded()}
        _check_names(full.tensors, parameters)
        if not is_first:
            return None
        shapes = functools.cache(lambda: _shapes_on_disk(source, plan))
        stored = {
            name: _stored(tensor, parameters.get(name) if original_names else None, shapes)
            for name, tensor in full.tensors.items()
            if tensor.tied_to is None
        }
        return _Writer(folder, stored, weights_name, index_name, max_file_bytes)

    what = "the checkpoint could not be written"
    writer = together(begin, what)
    failed: Exception | None = None

    def gather_and_write() -> None:
        nonlocal failed
        for name, tensor in full.tensors.items():
            if tensor.tied_to is None:
                gathered = full.gather(name)  # on every rank, also when the first one cannot write any more
                if writer is not None and gathered is not None and failed is None:
                    try:
                        writer.write(name, gathered)
                    except Exception as error:  # a full disk, or memory: the others send what they hold until the end
                        failed = error

    try:
        in_step(gather_and_write, what)
    except BaseException:
        if writer is not None:
            writer.drop()
        raise

    def finish() -> None:
        if writer is not None:
            try:
                if failed is not None:
                    raise failed
                writer.finish(write_config)
                warn_of_nonfinite(writer.not_finite, folder)
            except BaseException:
                writer.drop()
                raise

    together(finish, what)


class _Writer:
    """The files of a checkpoint that is being written."""

    def __init__(
        self,
        folder: Path,
        stored: Mapping[str, Sequence[Stored]],
        weights_name: str,
        index_name: str,
        max_file_bytes: int | str,
    ) -> None:
        make_folder(folder)
        self.folder, self.stored, self.weights_name, self.index_name = folder, stored, weights_name, index_name
        by_name = {one.name: one for found in stored.values() for one in found}
        split = split_torch_state_dict_into_shards(
            {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in by_name.items()},
            filename_pattern=weights_name.removesuffix(ENDING) + "{suffix}" + ENDING,
            max_shard_size=max_file_bytes,
        )
        self.file_of = split.tensor_to_filename
        self.total_size = split.metadata["total_size"]
        self.not_finite: Counter[str] = Counter()
        self.files: dict[str, OutputFile] = {}
        self.positions: dict[str, int] = {}
        for file_name, names in split.filename_to_tensors.items():
            tensors = sorted(
                (by_name[name] for name in names), key=lambda one: -one.dtype.itemsize
            )  # so all are aligned
            header = header_bytes([(one.name, _NAMES[one.dtype], one.shape) for one in tensors], {"format": "pt"})
            at = len(header)
            for one in tensors:
                self.positions[one.name] = at
                at += num_bytes(_NAMES[one.dtype], one.shape)
            self.files[file_name] = OutputFile(folder / file_name, at, header)
            self.files[file_name].create()
            self.files[file_name].close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write what the checkpoint holds of the tensor `name` of the model."""
        flat = tensor.reshape(-1)
        for one in self.stored[name]:
            output = self.files[self.file_of[one.name]]
            position = self.positions[one.name]
            output.open()
            try:
                elements = flat[one.start : one.start + one.numel]
                for part in torch.split(elements, CHUNK_BYTES // one.dtype.itemsize):
                    self.not_finite[one.name] += count_nonfinite(part)
                    data = part.contiguous().view(torch.uint8).numpy().data
                    output.write(data, position)
                    position += len(data)
            finally:
                output.close()

    def finish(self, write_config: Callable[[Path], None]) -> None:
        """Sync the files and give them their names; remove those of an earlier save, and write the index.

        Whatever stops it, the folder holds the earlier checkpoint or this one, or no complete one: no index names files
        of both.
        """
        for output in self.files.values():
            output.open()
            output.sync()
            output.close()
        aside = self.folder / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write_config(aside)
        others = sorted(aside.iterdir())
        for path in others:
            sync_file(path)
        if {*self.files} != {self.weights_name}:
            (self.folder / self.index_name).unlink(missing_ok=True)
            sync_folder(self.folder)
        for path in others:
            path.replace(self.folder / path.name)
        aside.rmdir()
        for output in self.files.values():
            output.take_name()
        sync_folder(self.folder)
        names = {*self.files}
        if names != {self.weights_name}:
            total = sum(one.numel for found in self.stored.values() for one in found)
            index = {
                "metadata": {"total_parameters": total, "total_size": self.total_size},
                "weight_map": self.file_of,
            }
            write_atomically(self.folder / self.index_name, json.dumps(index, indent=2, sort_keys=True) + "\n")
            names.add(self.index_name)
        stem, ending = map(re.escape, (self.weights_name.removesuffix(ENDING), ENDING))
        earlier = re.compile(rf"{stem}(-[0-9]{{5}}-of-[0-9]{{5}})?{ending}|{re.escape(self.index_name)}")
        for (
            path
        ) in self.folder.iterdir():  # of an earlier save: transformers might read it in the place of the new ones
            if earlier.fullmatch(path.name) and path.name not in names:
                path.unlink()
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def drop(self) -> None:
        """Remove what was not finished."""
        shutil.rmtree(self.folder / _ASIDE, ignore_errors=True)
        for output in self.files.values():
            output.remove()


def _stored(
    tensor: FullTensor, parameter: Parameter | None, shapes: Callable[[], Mapping[str, tuple[int, ...]]]
) -> list[Stored]:
    """The tensors of the checkpoint that a tensor of the model is."""
    names = [tensor.name] if parameter is None else list(parameter.names_on_disk())
    if len(names) == 1:
        return [Stored(name=names[0], dtype=tensor.dtype, shape=tensor.shape, start=0)]
    found, start = [], 0
    for name in names:
        found.append(Stored(name=name, dtype=tensor.dtype, shape=shapes()[name], start=start))
        start += found[-1].numel
    assert start == math.prod(tensor.shape), f"{tensor.name}: {start} elements on disk"
    return found


def _shapes_on_disk(source: ModelFolder | Original, plan: Plan) -> dict[str, tuple[int, ...]]:
    files = original_of(source, plan).source.files
    return {one.name: one.shape for file in files for one in parse_header(Path(file.name), file.header).tensors}


def _check_names(tensors: Mapping[str, FullTensor], parameters: Mapping[str, Parameter]) -> None:
    missing = [name for name in parameters if name not in tensors]
    if missing:
        raise MismatchError(
            Fault(
                code="not-the-plans-parameters",
                what="the model has not the parameters of its plan any more",
                where=f"save_pretrained: {missing[0]}",
                got=f"a model without {len(missing)} of its {len(parameters)} parameters, such as one with adapters",
                expected="the model that load_model returned",
                next="of a model with LoRA adapters: plan.save_adapter(engine, folder), on every rank",
            )
        )
