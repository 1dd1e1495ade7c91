"""A shards folder written by a running job: every rank its bytes, none gathered.

The files are those that `presplit` writes, so `merge` gives a Hugging Face checkpoint, and any job can start from them.
Each rank knows where its elements lie in them: its TP rank says in which file, the layout where a parameter begins,
ZeRO which of its elements this rank holds. What is not trained (headers, tokenizer, tensors that no rank reads) comes
from where the model came from.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.agreement import gathered, together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import partition_of
from autotp_plan.runtime.loading.weights import DTYPES
from autotp_plan.runtime.optimizers.finite import count_nonfinite, warn_of_nonfinite
from autotp_plan.runtime.parameters.partly_replicated import element_copies, held_parameters
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas.errors import Fault, OutputError
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.file_layout import MAX_FILE_BYTES, PlacedFile
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME, Owner, Source
from autotp_plan.schemas.shards.new_shards import NewShards
from autotp_plan.schemas.shards.origin import Original, original_of_checkpoint, original_of_shards
from autotp_plan.schemas.shards.output_file import OutputFile, temporary_path
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import local_files
from autotp_plan.schemas.storage.stamps import strictest_mode
from autotp_plan.sources.model_folder import ModelFolder, open_checkpoint

CHUNK_BYTES = 16 * 1024 * 1024

Written = dict[str, list[checksum.Block]]
"""By file, the checksums of what was written."""

_FAILED = "the shards of a running job could not be written"
_together = partial(together, what=_FAILED)


def save_shards(
    model: nn.Module,
    folder: Path,
    plan: Plan,
    ranks: Ranks,
    like: ModelFolder | Original,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights of a model as a shards folder, in the dtypes of the plan; every rank calls it.

    A save that dies leaves a folder without a manifest, which no job loads; the next save begins it anew. Weights that
    are NaN or inf, or too large for the dtype of the file, are written, and said.

    Args:
        model: a model from `load_model`.
        folder: a new folder, or one that an earlier save did not finish.
        plan: the plan of the model.
        ranks: of this process.
        like: the shards folder or checkpoint whose names, file split and small files the new one gets, or what was kept
            of it.
        max_file_bytes: a file has at most as many bytes of tensors, or one tensor.

    Raises:
        OutputError: the folder cannot be written. As all errors, the same on every rank.
        ShardsError: `like` is a shards folder that is not what its manifest says.
        CheckpointError: `like` is a checkpoint that cannot be read.
        MismatchError: not every rank calls it.
    """
    check_all_call("plan.save_shards")
    new = _together(lambda: NewShards(plan, original_of(like, plan), max_file_bytes))
    rank = _RankWriter(model, new, ranks)
    if torch.distributed.get_rank() > 0:
        _together(lambda: None)  # until the first rank has made the files
        _check_shared(new, folder, False)
        written = _together(lambda: rank.write(folder))
        torch.distributed.gather_object(written, None, dst=0)
        _together(lambda: None)
        gathered(lambda: rank.not_finite, _FAILED)
        return
    with contextlib.ExitStack() as stack:
        first = _together(lambda: _FirstRank(new, stack.enter_context(_output_folder(folder))))
        _check_shared(new, folder, True)
        written = _together(lambda: rank.write(folder))
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.gather_object(written, everyone, dst=0)
        _together(lambda: first.finish(everyone, rank.untrained()))
    counts: Counter[str] = sum(gathered(lambda: rank.not_finite, _FAILED), Counter())
    warn_of_nonfinite(counts, folder)


def _check_shared(new: NewShards, folder: Path, is_first: bool) -> None:
    """Every rank must see the files that the first one has made: it writes a number where the first header will be."""
    marked = temporary_path(folder / next(iter(new.layout.files())).name)
    mark = uuid.uuid4().bytes

    def write() -> bytes:
        if is_first:
            with open(marked, "r+b") as file:
                file.write(mark)
        return mark

    expected = gathered(write, _FAILED)[0]

    def read() -> None:
        found = _beginning(marked) if marked.exists() else b""
        if found != expected and not is_first:
            raise OutputError(
                Fault(
                    code="shards-not-shared",
                    what="the ranks would not save one shards folder",
                    where=str(folder),
                    got="no files that the first rank has made",
                    expected="one folder that all ranks share",
                    next="give a folder on a file system that all nodes share, the same one on every rank",
                )
            )

    _together(read)


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def _output_folder(folder: Path) -> OutputFolder:
    return OutputFolder(folder, {"command": "save_shards"}, "save_shards")


def check_shards_folder(folder: Path) -> None:
    """Begin to write shards to a folder as `save_shards` does, and leave it as it was.

    Raises:
        OutputError: `save_shards` would be refused, or could not write.
    """
    journal = folder / JOURNAL_NAME
    was_begun = journal.exists()
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with _output_folder(folder):
        if not was_begun:
            journal.unlink()
    with contextlib.suppress(OSError):  # another process has made something in it meanwhile
        for place in missing:
            place.rmdir()


def original_of(like: ModelFolder | Original, plan: Plan) -> Original:
    """What is not sharded of the checkpoint or shards folder `like`."""
    if isinstance(like, Original):
        return like
    if (like.folder / MANIFEST_NAME).exists():
        return original_of_shards(read_shards(like.folder))
    like.complete()
    return original_of_checkpoint(open_checkpoint(like, plan.dequantized_dtype), plan)


class _RankWriter:
    """What one rank writes: its elements of every parameter."""

    def __init__(self, model: nn.Module, new: NewShards, ranks: Ranks) -> None:
        self.model, self.plan, self.ranks, self.original = model, new.plan, ranks, new.original
        self.files = list(new.layout.files())
        self.not_finite: Counter[str] = Counter()
        """How many elements of each tensor were NaN or inf in the dtype of the file, of those that have any."""
        self.parameters = {parameter.name: parameter for parameter in self.plan.expanded()}
        names = {name: to for tie in self.plan.tied for name, to in zip(expand(tie.name), expand(tie.to))}
        unused = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.original.unused}
        self.copies = {  # what is tied in the model, and stored once more in the checkpoint
            name: to
            for name, to in names.items()
            if unused.get(name) == (self.parameters[to].dtype, self.plan.shape_of(self.parameters[to]))
        }

    def write(self, folder: Path) -> Written:
        """Write this rank's bytes into the files that the first rank has made."""
        owners = {self.ranks.tp_rank, Owner.NO_RANK, *([Owner.ALL_RANKS] if self.ranks.tp_rank == 0 else [])}
        written: Written = {}
        for file in self.files:
            if file.owner not in owners:
                continue
            output = OutputFile(folder / file.name, file.size)
            output.open()
            try:
                for tensor, position in zip(file.tensors, file.positions()):
                    for at, elements in self._parts(file, tensor.name):
                        self.not_finite[tensor.name] += _write(output, position + at, elements, tensor.dtype)
                if output.blocks:
                    output.sync()
                    written[file.name] = checksum.join_blocks(output.blocks)
            finally:
                output.close()
        return written

    def untrained(self) -> dict[str, ByteRanges]:
        """Where the tensors lie that no rank reads and that are not tied to one that is trained, by name."""
        return {
            tensor.name: ByteRanges.of([tensor]) for tensor in self.original.unused if tensor.name not in self.copies
        }

    def _parts(self, file: PlacedFile, name: str) -> Iterator[tuple[int, Tensor]]:
        """This rank's elements of a tensor of `file`, in contiguous parts: `(offset in bytes, elements)`."""
        parameter = self.parameters.get(self.copies.get(name, name))
        if parameter is None or (file.owner is Owner.NO_RANK and name not in self.copies):
            return
        layout, shape = self.plan.layouts[parameter.layout], self.plan.shape_of(parameter)
        owner, _, leaf = parameter.name.rpartition(".")
        held = held_parameters(leaf, layout, shape, self.ranks.tp_rank)
        assert file.owner is not Owner.NO_RANK or len(held) == 1, f"{name} is tied, and partly replicated"
        itemsize = DTYPES[parameter.dtype].itemsize
        for one in held:
            start, elements = self._owned(self.model.get_submodule(owner), one.name)
            if file.owner is Owner.NO_RANK:
                copies = layout.first_held_copies(self.ranks.tp_rank).reverse()
            else:
                copies = element_copies(one, layout, self.ranks.tp_rank)
            for source, target, length in copies:
                begin, end = max(source, start), min(source + length, start + elements.numel())
                if begin < end:
                    yield (target + begin - source) * itemsize, elements[begin - start : end - start]

    def _owned(self, owner: nn.Module, leaf: str) -> tuple[int, Tensor]:
        """The elements of a flattened parameter that this DP rank writes, and where they begin."""
        dp_rank, dp_size = self.ranks.dp_rank, self.ranks.dp_size
        held: Any = tensor_of(owner, leaf)
        if not isinstance(held, nn.Parameter):
            return 0, held.reshape(-1)[: held.numel() if dp_rank == 0 else 0]
        partition = partition_of(held, dp_rank)
        if partition is not None:
            return partition
        size = -(-held.numel() // dp_size)
        return dp_rank * size, held.detach().reshape(-1)[dp_rank * size : (dp_rank + 1) * size]


class _FirstRank:
    """What the first rank does for all: make the files, and finish them when every rank has written its bytes."""

    def __init__(self, new: NewShards, folder: OutputFolder) -> None:
        self.new, self.folder = new, folder
        folder.restart(new.all_sizes())
        self.outputs = {file.name: OutputFile(folder.path / file.name, file.size) for file in new.layout.files()}
        for output in self.outputs.values():
            folder.begin(output)
            output.close()

    def finish(self, everyone: Sequence[Written], untrained: dict[str, ByteRanges]) -> None:
        """Write headers and what is not trained, give the files their names, and write plan and manifest."""
        files = list(self.new.layout.files())
        for file in files:
            output = self.outputs[file.name]
            output.blocks = [block for written in everyone for block in written.get(file.name, ())]
            self._copy_untrained(file, output, untrained)
        source = self._source(files)
        for file in files:
            output = self.outputs[file.name]
            output.open()
            output.write(memoryview(file.header(source.fingerprint)), 0)
            self.folder.finish(output)
        for name, path, size in self.new.original.copied:
            modes = (one.stat().st_mode for one in local_files(path))
            output = OutputFile(self.folder.path / name, size, mode=strictest_mode(modes))
            self.folder.begin(output)
            output.copy(ByteRanges.of_file(path, size).ranges, 0)
            self.folder.finish(output)
        self.new.finish(self.folder, source)
        read_shards(self.folder.path, self.new.plan)

    def _copy_untrained(self, file: PlacedFile, output: OutputFile, untrained: dict[str, ByteRanges]) -> None:
        if file.owner is Owner.NO_RANK:
            output.open()
            for tensor, position in zip(file.tensors, file.positions()):
                if tensor.name in untrained:
                    output.copy(untrained[tensor.name].ranges, position)
            output.close()

    def _source(self, files: Sequence[PlacedFile]) -> Source:
        """The headers of the checkpoint, and a fingerprint of what is in the files now."""
        digest = hashlib.sha256(self.new.original.source.fingerprint.encode())
        for file in files:
            first, *_, size = file.positions()
            moved = [block._replace(start=block.start - first) for block in self.outputs[file.name].blocks]
            digest.update(f"{file.name} {checksum.of_blocks(moved, size - first)}\n".encode())
        return replace(self.new.original.source, fingerprint=f"sha256:{digest.hexdigest()}")


def _write(output: OutputFile, position: int, elements: Tensor, dtype: str) -> int:
    """Write elements in the dtype of the file, a bounded number at a time; returns how many are NaN or inf in it."""
    itemsize, not_finite = DTYPES[dtype].itemsize, 0
    for part in torch.split(elements, CHUNK_BYTES // itemsize):
        stored = part.to("cpu", DTYPES[dtype]).contiguous()
        not_finite += count_nonfinite(stored)
        data = stored.view(torch.uint8).numpy().data
        output.write(data, position)
        position += len(data)
    return not_finite
