"""A shards folder written by a running job: every rank its own bytes, none gathered.

The files are those that `presplit` writes, so `merge` gives a Hugging Face checkpoint, and any job can start from them.
Each rank knows where its elements lie in them: its TP rank says in which file, the layout where a parameter begins,
ZeRO which run of it is this rank's. What is not trained (headers, tokenizer, tensors that no rank reads) comes from
where the model came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import partition_of
from autotp_plan.runtime.loading.weights import DTYPES
from autotp_plan.runtime.tensor_parallel.partly_replicated import (
    element_copies,
    first_held_elements,
    held_parameters,
)
from autotp_plan.schemas.documents import write_atomically
from autotp_plan.schemas.errors import AutoTPError, Fault, ShardsError
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.file_layout import MAX_FILE_BYTES, PlacedFile, ShardLayout
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME, PLAN_NAME, Manifest, ShardFile, Source
from autotp_plan.schemas.shards.origin import Original, original_of_checkpoint, original_of_shards
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.checkpoint import read_checkpoint

CHUNK_BYTES = 16 * 1024 * 1024
_JOURNAL = json.dumps({"command": "save_shards"}) + "\n"
_NO_SOURCE = "sha256:" + 64 * "0"

Written = dict[str, list[tuple[int, int, int]]]
"""By file, the `(position, length, CRC-32)` of what was written."""


def save_shards(
    model: nn.Module, folder: Path, plan: Plan, ranks: Ranks, like: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the weights of `model` into `folder`; every rank calls it. Raises ShardsError on all ranks alike.

    `like` is the shards folder or checkpoint that says what the checkpoint looks like. Weights are written in the
    dtypes of the plan. A folder that an earlier attempt did not finish is begun anew.
    """
    original = _together(lambda: _original(like, plan))
    writer = _Writer(model, folder, plan, ranks, original, max_file_bytes)
    first = torch.distributed.get_rank() == 0
    _together(writer.prepare if first else lambda: None)
    written = _together(writer.write)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(written, everyone if first else None, dst=0)
    _together((lambda: writer.finish(everyone)) if first else lambda: None)


def _together(work: Any) -> Any:
    """What `work` returns; when it fails on any rank, the error of the first of them, on all."""
    found, error = None, None
    try:
        found = work()
    except AutoTPError as raised:
        error = raised
    except OSError as raised:
        error = ShardsError(
            Fault(
                what="the shards of a running job could not be written",
                where=str(raised.filename or "the folder"),
                got=raised.strerror or str(raised),
                expected="a folder that all ranks can write to",
                next="free space or correct what is wrong, and save again",
            )
        )
    errors: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    for one in errors:
        if one is not None:
            raise one
    return found


def _original(like: Path, plan: Plan) -> Original:
    if (like / MANIFEST_NAME).exists():
        return original_of_shards(read_shards(like))
    return original_of_checkpoint(read_checkpoint(like), plan)


class _Writer:
    """One rank's part of the work; `prepare` and `finish` are the first rank's."""

    def __init__(
        self, model: nn.Module, folder: Path, plan: Plan, ranks: Ranks, original: Original, max_file_bytes: int
    ) -> None:
        self.model, self.folder, self.plan, self.ranks, self.original = model, folder, plan, ranks, original
        self.files = list(ShardLayout(plan, original.unused, max_file_bytes).files())
        self.parameters = {parameter.name: parameter for parameter in plan.expanded()}
        names = {name: to for tie in plan.tied for name, to in zip(expand(tie.name), expand(tie.to))}
        unused = {tensor.name: (tensor.dtype, tensor.shape) for tensor in original.unused}
        self.copies = {  # what is tied in the model, and stored once more in the checkpoint
            name: to
            for name, to in names.items()
            if unused.get(name) == (self.parameters[to].dtype, plan.shape_of(self.parameters[to]))
        }

    def prepare(self) -> None:
        """Make the folder, and every file of tensors under a temporary name, as large as it will be."""
        if self.folder.exists():
            self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / JOURNAL_NAME).write_text(_JOURNAL, encoding="utf-8")
        for file in self.files:
            path = self._temporary(file.name)
            path.touch()
            os.truncate(path, file.positions(self._header(file, _NO_SOURCE))[-1])

    def write(self) -> Written:
        """Write this rank's bytes of every file."""
        written: Written = defaultdict(list)
        for file in self.files:
            if not file.unused and file.rank not in (self.ranks.tp_rank, None if self.ranks.tp_rank == 0 else -1):
                continue
            positions = file.positions(self._header(file, _NO_SOURCE))
            descriptor = os.open(self._temporary(file.name), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for tensor, position in zip(file.tensors, positions):
                    for at, part in self._parts(file, tensor.name):
                        written[file.name] += _write(descriptor, position + at, part, tensor.dtype)
                if file.name in written:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return {name: _joined(pieces) for name, pieces in written.items()}

    def finish(self, everyone: Sequence[Written]) -> None:
        """Headers and checksums, the files that are not tensors, names, and the manifest."""
        pieces: Written = defaultdict(list)
        for written in (*everyone, self._untrained()):
            for name, found in written.items():
                pieces[name] += found
        source = self._source(pieces)
        entries = [self._finish(file, pieces[file.name], source) for file in self.files]
        for name, path, size in self.original.copied:
            shutil.copyfile(path, self._temporary(name))
            entries.append(self._named(name, size))
        self._temporary(PLAN_NAME).write_text(self.plan.to_json(), encoding="utf-8")
        entries.append(self._named(PLAN_NAME, self._temporary(PLAN_NAME).stat().st_size))
        manifest = Manifest(
            plan=self.plan.fingerprint,
            tp_size=self.plan.tp_size,
            files=tuple(sorted(entries, key=lambda file: file.name)),
            source=source,
        )
        for entry in entries:
            self._temporary(entry.name).replace(self.folder / entry.name)
        write_atomically(self.folder / MANIFEST_NAME, manifest.to_json())
        (self.folder / JOURNAL_NAME).unlink()
        read_shards(self.folder, self.plan)

    def _clear(self) -> None:
        """Remove what an earlier save has left. Raises ShardsError when there is anything else."""
        journal = self.folder / JOURNAL_NAME
        names = [file.name for file in self.files] + [name for name, _, _ in self.original.copied]
        names += [PLAN_NAME, MANIFEST_NAME]
        ours = {JOURNAL_NAME, *names, *(self._temporary(name).name for name in names)}
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {"a file"}
        begun = not found or (journal.is_file() and journal.read_text(encoding="utf-8") == _JOURNAL)
        if not begun or not found <= ours or self.folder.is_symlink():
            raise ShardsError(
                Fault(
                    what="the shards of a running job cannot be written here",
                    where=str(self.folder),
                    got=", ".join(sorted(found - ours)[:3]) or "finished shards",
                    expected="a new folder, or one that an earlier save did not finish",
                    next="give another folder",
                )
            )
        for name in found - {JOURNAL_NAME}:
            (self.folder / name).unlink()

    def _parts(self, file: PlacedFile, name: str) -> Iterator[tuple[int, Tensor]]:
        """This rank's runs of a tensor of `file`: `(offset in bytes, elements)`."""
        parameter = self.parameters[self.copies.get(name, name)] if name in {**self.copies, **self.parameters} else None
        if parameter is None or (file.unused and name not in self.copies):
            return
        layout, shape = self.plan.layouts[parameter.layout], self.plan.shape_of(parameter)
        owner, _, leaf = parameter.name.rpartition(".")
        held = held_parameters(leaf, layout, shape, self.ranks.tp_rank)
        assert not file.unused or len(held) == 1, f"{name} is tied, and partly replicated"
        itemsize = DTYPES[parameter.dtype].itemsize
        for one in held:
            start, elements = self._owned(self.model.get_submodule(owner), one.name)
            if file.unused:
                copies = first_held_elements(layout, self.ranks.tp_rank)
            else:
                copies = element_copies(one, layout, self.ranks.tp_rank)
            for source, target, length in copies:
                begin, end = max(source, start), min(source + length, start + elements.numel())
                if begin < end:
                    yield (target + begin - source) * itemsize, elements[begin - start : end - start]

    def _owned(self, owner: nn.Module, leaf: str) -> tuple[int, Tensor]:
        """The run of a flattened parameter that this DP rank writes: where it begins, and its elements."""
        dp_rank, dp_size = self.ranks.dp_rank, self.ranks.dp_size
        held: Any = getattr(owner, leaf)
        if not isinstance(held, nn.Parameter):
            return 0, held.reshape(-1)[: held.numel() if dp_rank == 0 else 0]
        partition = partition_of(held, dp_rank)
        if partition is not None:
            return partition
        size = -(-held.numel() // dp_size)
        return dp_rank * size, held.detach().reshape(-1)[dp_rank * size : (dp_rank + 1) * size]

    def _untrained(self) -> Written:
        """Copy the tensors that no rank reads and that are not tied to one that is trained."""
        entries = {tensor.name: tensor for tensor in self.original.unused if tensor.name not in self.copies}
        written: Written = defaultdict(list)
        for file in self.files:
            if not file.unused:
                continue
            positions = file.positions(self._header(file, _NO_SOURCE))
            with open(self._temporary(file.name), "r+b", buffering=0) as target:
                for tensor, position in zip(file.tensors, positions):
                    entry = entries.get(tensor.name)
                    if entry is None:
                        continue
                    with open(entry.file, "rb") as source:
                        for at in range(0, tensor.size, CHUNK_BYTES):
                            source.seek(entry.start + at)
                            data = source.read(min(CHUNK_BYTES, tensor.size - at))
                            os.pwrite(target.fileno(), data, position + at)
                            written[file.name].append((position + at, len(data), checksum.of_bytes(data)))
                os.fsync(target.fileno())
        return written

    def _source(self, pieces: Written) -> Source:
        """The headers of the checkpoint, and a fingerprint of what is in the files now."""
        digest = hashlib.sha256(self.original.source.fingerprint.encode())
        for file in self.files:
            first, *_, size = file.positions(self._header(file, _NO_SOURCE))
            moved = [(position - first, length, crc) for position, length, crc in pieces[file.name]]
            digest.update(f"{file.name} {checksum.of_pieces(moved, size - first)}\n".encode())
        return replace(self.original.source, fingerprint=f"sha256:{digest.hexdigest()}")

    def _finish(self, file: PlacedFile, pieces: list[tuple[int, int, int]], source: Source) -> ShardFile:
        header = self._header(file, source.fingerprint)
        size = file.positions(header)[-1]
        with open(self._temporary(file.name), "r+b", buffering=0) as target:
            target.write(header)
            os.fsync(target.fileno())
        found = checksum.of_pieces([(0, len(header), checksum.of_bytes(header)), *pieces], size)
        return file.entry(size, checksum.text(found))

    def _named(self, name: str, size: int) -> ShardFile:
        found = checksum.of_files({self._temporary(name): size})[self._temporary(name)]
        if isinstance(found, OSError):
            raise found
        return ShardFile(name=name, size=size, crc32=checksum.text(found))

    def _header(self, file: PlacedFile, source: str) -> bytes:
        return file.header(self.plan.fingerprint, source)

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.tmp"


def _write(descriptor: int, position: int, elements: Tensor, dtype: str) -> Iterator[tuple[int, int, int]]:
    """Write elements in the dtype of the file, a bounded number at a time."""
    itemsize = DTYPES[dtype].itemsize
    for part in torch.split(elements, CHUNK_BYTES // itemsize):
        data = part.to("cpu", DTYPES[dtype]).contiguous().view(torch.uint8).numpy().data
        crc, length, left = checksum.of_bytes(data), len(data), data
        at = position
        while left:
            count = os.pwrite(descriptor, left, at)
            left, at = left[count:], at + count
        yield position, length, crc
        position += length


def _joined(pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same pieces, those that touch made one."""
    joined: list[tuple[int, int, int]] = []
    for position, length, crc in sorted(pieces):
        if joined and sum(joined[-1][:2]) == position:
            before, count, first = joined[-1]
            joined[-1] = (before, count + length, checksum.combine(first, crc, length))
        else:
            joined.append((position, length, crc))
    return joined
