"""Writing a shards folder: which files there are, which tensor lies where in them, and the manifest.

Where the bytes come from (a checkpoint, or shards of another TP size) is for the caller to say; from the same plan and
source the folder is the same, to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.planner.shards.copy_engine import Batch, write_batches
from autotp_plan.planner.shards.copy_plan import Move, Part, part, whole
from autotp_plan.planner.shards.resumable_folder import OutputFile, OutputFolder, Progress
from autotp_plan.schemas.errors import AutoTPError, Fault, ShardsError
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.file_layout import PlacedFile, ShardLayout
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME, PLAN_NAME, Manifest, ShardFile
from autotp_plan.schemas.shards.origin import Original
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.byte_ranges import Segments
from autotp_plan.schemas.storage.safetensors_header import num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What goes into shards: where each parameter's bytes are, every byte once, and what is not cut."""

    original: Original
    read_from: Callable[[Parameter], tuple[Part, ...]]


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
    layout = _Files(plan, contents, output, max_file_bytes)
    finished = _finished(plan, contents, output, layout, workers)
    if finished is not None:
        return finished
    task = {
        "command": command,
        "plan": plan.fingerprint,
        "source": contents.original.source.fingerprint,
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


def _finished(plan: Plan, contents: Contents, output: Path, layout: _Files, workers: int) -> Manifest | None:
    """The manifest of `output` when it holds all of this already: an earlier attempt was stopped as it ended."""
    try:
        if not (output / MANIFEST_NAME).exists() or (output / JOURNAL_NAME).exists():
            return None
        shards = read_shards(output, plan)
        sizes = {file.name: file.size for file in shards.manifest.files if file.name != PLAN_NAME}
        if shards.manifest.source != contents.original.source or sizes != layout.sizes():
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


class _Files:
    """The files of a shards folder, and the moves that fill them."""

    def __init__(self, plan: Plan, contents: Contents, folder: Path, max_file_bytes: int) -> None:
        self.plan, self.contents, self.folder = plan, contents, folder
        self.layout = ShardLayout(plan, contents.original.unused, max_file_bytes)
        self.unused = {tensor.name: tensor for tensor in contents.original.unused}
        self.total = (
            sum(self._num_bytes(parameter) for parameter in plan.expanded())
            + sum(tensor.stop - tensor.start for tensor in contents.original.unused)
            + sum(size for _, _, size in contents.original.copied)
        )

    def sizes(self) -> dict[str, int]:
        """The size of every file but the plan's and the manifest."""
        sizes = {name: size for name, _, size in self.contents.original.copied}
        return sizes | {file.name: self._output(file)[0].size for file in self.layout.files()}

    def batches(self) -> Iterator[Batch]:
        """Every file but the plan's and the manifest, and how it is filled."""
        for files in self.layout.together():
            written = [self._output(file) for file in files]
            yield Batch(
                outputs=[output for output, _ in written],
                moves=self._moves(files, [placed for _, placed in written]),
                size=sum(
                    self._num_bytes(tensor.parameter) if tensor.parameter else tensor.size
                    for tensor in files[0].tensors
                ),
            )
        for name, path, size in self.contents.original.copied:
            yield copy_of(path, self.folder / name, size)

    def manifest(self, folder: OutputFolder) -> Manifest:
        """The manifest of the folder, whose other files are all written."""
        entries = []
        tensors = {file.name: file for file in self.layout.files()}
        for name in [*tensors, *(name for name, _, _ in self.contents.original.copied), PLAN_NAME]:
            found = folder.finished[name]
            crc32 = checksum.text(found.crc32)
            entry = ShardFile(name=name, size=found.size, crc32=crc32)
            entries.append(tensors[name].entry(found.size, crc32) if name in tensors else entry)
        return Manifest(
            plan=self.plan.fingerprint,
            tp_size=self.plan.tp_size,
            files=tuple(sorted(entries, key=lambda file: file.name)),
            source=self.contents.original.source,
        )

    def _output(self, file: PlacedFile) -> tuple[OutputFile, list[Segments]]:
        """The file as it is written, and where each of its tensors lies."""
        header = file.header(self.plan.fingerprint, self.contents.original.source.fingerprint)
        *positions, size = file.positions(header)
        path = self.folder / file.name
        placed = [
            _segments(tensor.name, tensor.dtype, path, at, tensor.size) for tensor, at in zip(file.tensors, positions)
        ]
        return OutputFile(name=file.name, header=header, size=size), placed

    def _moves(self, files: Sequence[PlacedFile], placed: Sequence[Sequence[Segments]]) -> Iterator[Move]:
        for index, tensor in enumerate(files[0].tensors):
            if tensor.parameter is None:
                source = Segments.of(tensor.name, [self.unused[tensor.name]])
                yield Move(size=source.size, inputs=(whole(source),), outputs=(whole(placed[0][index]),))
                continue
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


def _raw(path: Path, size: int) -> Part:
    return whole(_segments(path.name, "U8", path, 0, size))


def _segments(name: str, dtype: str, path: Path, at: int, size: int) -> Segments:
    return Segments(name=name, dtype=dtype, size=size, begins=(0,), files=(path,), positions=(at,))
