"""Writing a shards folder: which files there are, which tensor lies where in them, and the manifest.

Where the bytes come from (a checkpoint, or shards of another TP size) is for the caller to say; from the same plan and
source the folder is the same, to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autotp_plan.planner.byte_runs import Move, Part, part, whole
from autotp_plan.planner.copying import Batch, write_batches
from autotp_plan.planner.output_folder import OutputFile, OutputFolder, Progress
from autotp_plan.schemas import checksum
from autotp_plan.schemas.errors import AutoTPError, Fault, ShardsError
from autotp_plan.schemas.layout import parameter_shape
from autotp_plan.schemas.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
    ShardFile,
    Source,
    owner_name,
    shard_file_name,
)
from autotp_plan.schemas.plan import Parameter, Plan
from autotp_plan.schemas.safetensors_file import BITS, header_bytes, num_bytes
from autotp_plan.schemas.segments import Segments
from autotp_plan.schemas.shards import rank_text, read_shards

_T = TypeVar("_T")
MAX_FILE_BYTES = 4 * 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Unused:
    """A tensor that no rank reads, kept for `merge`."""

    shape: tuple[int, ...]
    source: Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What goes into shards: where each parameter's bytes are, the tensors that no rank reads, and files as they are.

    `read_from` holds every byte of a parameter once; `copied` are sizes of files by their path.
    """

    source: Source
    read_from: Callable[[Parameter], tuple[Part, ...]]
    unused: Sequence[Unused]
    copied: Sequence[tuple[str, Path, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """A tensor of a file: as its header has it, and the parameter it is a shard of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: Parameter | None = None
    unused: Unused | None = None


def write_shards(
    plan: Plan,
    contents: Contents,
    output: Path,
    command: str,
    *,
    max_file_bytes: int,
    workers: int,
    progress: Progress | None,
) -> Manifest:
    """Write the shards of `plan` into the folder `output`, or what is left to do of it. Raises ShardsError."""
    check_workers(command, workers, max_file_bytes)
    layout = _FolderLayout(plan, contents, output, max_file_bytes)
    finished = _finished(plan, contents, output, layout, workers)
    if finished is not None:
        return finished
    task = {
        "command": command,
        "plan": plan.fingerprint,
        "source": contents.source.fingerprint,
        "file size": str(max_file_bytes),
    }
    with OutputFolder(output, task, command) as folder:
        try:
            folder.keep({**layout.sizes(), PLAN_NAME: -1, MANIFEST_NAME: -1}, workers, progress)
            write_batches(layout.batches(), folder, total=layout.total, workers=workers, progress=progress)
            folder.write_small(PLAN_NAME, plan.to_json().encode())
            manifest = layout.manifest(folder)
            folder.sync()
            folder.write_small(MANIFEST_NAME, manifest.to_json().encode())
            folder.close()
        except (OSError, EOFError) as error:
            raise ShardsError(stopped(output, command, error)) from error
    return manifest


def _finished(plan: Plan, contents: Contents, output: Path, layout: _FolderLayout, workers: int) -> Manifest | None:
    """The manifest of `output` when it holds all of this already: an earlier attempt was stopped as it ended."""
    try:
        if not (output / MANIFEST_NAME).exists() or (output / JOURNAL_NAME).exists():
            return None
        shards = read_shards(output, plan)
        sizes = {file.name: file.size for file in shards.manifest.files if file.name != PLAN_NAME}
        if shards.manifest.source != contents.source or sizes != layout.sizes():
            return None
        shards.verify(workers)
    except (AutoTPError, OSError):
        return None
    return shards.manifest


def check_workers(command: str, workers: int, max_file_bytes: int = 1) -> None:
    """Raise ShardsError unless both are positive."""
    if workers < 1 or max_file_bytes < 1:
        got = f"workers {workers}, file size {max_file_bytes}"
        raise ShardsError(Fault(what=f"{command} cannot run", where=command, got=got, expected="positive numbers"))


def copy_of(path: Path, target: Path, size: int) -> Batch:
    """A file copied as it is."""
    move = Move(size=size, inputs=(_raw(path, size),), outputs=(_raw(target, size),))
    return Batch(outputs=[OutputFile(name=target.name, header=b"", size=size)], moves=[move], size=size)


def stopped(output: Path, command: str, error: OSError | EOFError) -> Fault:
    """What is said when the operating system ended a command."""
    return Fault(
        what=f"{command} was stopped by the operating system",
        where=str(output),
        got=getattr(error, "strerror", None) or str(error),
        expected="to read all of the input and write all of the output",
        next=f"free space or correct what is wrong, and run {command} again: it continues with what is missing",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A file of the folder; `rank` as in a manifest."""

    name: str
    rank: int | None
    unused: bool
    tensors: Sequence[_Tensor]

    def entry(self, size: int, crc32: int) -> ShardFile:
        return ShardFile(name=self.name, size=size, crc32=checksum.text(crc32), rank=self.rank, unused=self.unused)


class _FolderLayout:
    """The files of a shards folder, and the moves that fill them."""

    def __init__(self, plan: Plan, contents: Contents, folder: Path, max_file_bytes: int) -> None:
        self.plan, self.contents, self.folder = plan, contents, folder
        parameters = sorted(plan.expanded(), key=lambda p: -BITS[p.dtype])  # so that each tensor begins at its size
        cut = [p for p in parameters if plan.layouts[p.layout].dim is not None]
        shared = [p for p in parameters if plan.layouts[p.layout].dim is None]
        unused = sorted(contents.unused, key=lambda tensor: -BITS[tensor.source.dtype])
        # all ranks are grouped by the bytes of rank 0, the largest of an uneven cut: a part holds the same on each
        self._cut = _grouped(cut, lambda p: num_bytes(p.dtype, plan.layouts[p.layout].rank_shape(0)), max_file_bytes)
        self._shared = _grouped(shared, self._num_bytes, max_file_bytes)
        self._unused = _grouped(unused, lambda tensor: tensor.source.size, max_file_bytes)
        self.total = (
            sum(map(self._num_bytes, parameters))
            + sum(tensor.source.size for tensor in unused)
            + sum(size for _, _, size in contents.copied)
        )

    def sizes(self) -> dict[str, int]:
        """The size of every file but the plan's and the manifest."""
        sizes = {name: size for name, _, size in self.contents.copied}
        for file in self._files():
            sizes[file.name] = self._output(file)[0].size
        return sizes

    def batches(self) -> Iterator[Batch]:
        """Every file but the plan's and the manifest, and how it is filled."""
        ranks = range(self.plan.tp_size)
        for index, members in enumerate(self._cut):
            yield self._batch([self._file(rank, index) for rank in ranks], sum(map(self._num_bytes, members)))
        for index, members in enumerate(self._shared):
            yield self._batch([self._file(None, index)], sum(map(self._num_bytes, members)))
        for index, kept in enumerate(self._unused):
            yield self._batch([self._unused_file(index)], sum(tensor.source.size for tensor in kept))
        for name, path, size in self.contents.copied:
            yield copy_of(path, self.folder / name, size)

    def manifest(self, folder: OutputFolder) -> Manifest:
        """The manifest of the folder, whose other files are all written."""
        files = [self._entry(file.name, folder, file) for file in self._files()]
        files += [self._entry(name, folder) for name, _, _ in self.contents.copied]
        files.append(self._entry(PLAN_NAME, folder))
        return Manifest(
            plan=self.plan.fingerprint,
            tp_size=self.plan.tp_size,
            files=tuple(sorted(files, key=lambda file: file.name)),
            source=self.contents.source,
        )

    def _entry(self, name: str, folder: OutputFolder, file: _File | None = None) -> ShardFile:
        found = folder.finished[name]
        rank, unused = (-1, False) if file is None else (file.rank, file.unused)
        return ShardFile(name=name, size=found.size, crc32=checksum.text(found.crc32), rank=rank, unused=unused)

    def _files(self) -> Iterator[_File]:
        for rank in range(self.plan.tp_size):
            yield from (self._file(rank, index) for index in range(len(self._cut)))
        yield from (self._file(None, index) for index in range(len(self._shared)))
        yield from (self._unused_file(index) for index in range(len(self._unused)))

    def _file(self, rank: int | None, index: int) -> _File:
        parts = self._shared if rank is None else self._cut
        tensors = []
        for parameter in parts[index]:
            layout = self.plan.layouts[parameter.layout]
            shape = parameter_shape(self.plan.shape_of(parameter), layout.shape, layout.rank_shape(rank or 0))
            tensors.append(_Tensor(name=parameter.name, dtype=parameter.dtype, shape=shape, parameter=parameter))
        name = shard_file_name(owner_name(rank, self.plan.tp_size), index, len(parts))
        return _File(name=name, rank=rank, unused=False, tensors=tensors)

    def _unused_file(self, index: int) -> _File:
        tensors = [
            _Tensor(name=tensor.source.name, dtype=tensor.source.dtype, shape=tensor.shape, unused=tensor)
            for tensor in self._unused[index]
        ]
        name = shard_file_name("unused", index, len(self._unused))
        return _File(name=name, rank=-1, unused=True, tensors=tensors)

    def _output(self, file: _File) -> tuple[OutputFile, list[Segments]]:
        """The file as it is written, and where each of its tensors lies."""
        metadata = {
            "format": "pt",
            "autotp_plan": self.plan.fingerprint,
            "autotp_source": self.contents.source.fingerprint,
            "tp_rank": rank_text(file.entry(0, 0)),
        }
        header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors], metadata)
        at, path = len(header), self.folder / file.name
        placed: list[Segments] = []
        for tensor in file.tensors:
            size = num_bytes(tensor.dtype, tensor.shape)
            placed.append(_segments(tensor.name, tensor.dtype, path, at, size))
            at += size
        return OutputFile(name=file.name, header=header, size=at), placed

    def _batch(self, files: Sequence[_File], size: int) -> Batch:
        written = [self._output(file) for file in files]
        return Batch(
            outputs=[output for output, _ in written],
            moves=self._moves(files, [placed for _, placed in written]),
            size=size,
        )

    def _moves(self, files: Sequence[_File], placed: Sequence[Sequence[Segments]]) -> Iterator[Move]:
        for index, tensor in enumerate(files[0].tensors):
            if tensor.unused is not None:
                source = tensor.unused.source
                yield Move(size=source.size, inputs=(whole(source),), outputs=(whole(placed[0][index]),))
                continue
            assert tensor.parameter is not None
            layout = self.plan.layouts[tensor.parameter.layout]
            yield Move(
                size=self._num_bytes(tensor.parameter),
                inputs=self.contents.read_from(tensor.parameter),
                outputs=tuple(
                    part(layout, layout.rank_intervals(file.rank or 0), segments[index])
                    for file, segments in zip(files, placed)
                ),
            )

    def _num_bytes(self, parameter: Parameter) -> int:
        return num_bytes(parameter.dtype, self.plan.shape_of(parameter))


def _grouped(members: Sequence[_T], size_of: Callable[[_T], int], most: int) -> list[list[_T]]:
    """`members` in groups of at most `most` bytes, or of one."""
    groups: list[list[_T]] = []
    filled = 0
    for member in members:
        size = size_of(member)
        if not groups or filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(member)
        filled += size
    return groups


def _raw(path: Path, size: int) -> Part:
    return whole(_segments(path.name, "U8", path, 0, size))


def _segments(name: str, dtype: str, path: Path, at: int, size: int) -> Segments:
    return Segments(name=name, dtype=dtype, size=size, begins=(0,), files=(path,), positions=(at,))
