"""From shards back to the checkpoint they were cut from: the same files, to the byte.

Headers come from the manifest as they were, so file split, tensor names, dtypes and metadata are the original's, and a
file has the checksum it had on the hub. Files beside the weights come back too; what `presplit` did not copy (pickles,
folders, hidden files) does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.planner.shards.copy_engine import Batch, write_batches
from autotp_plan.planner.shards.copy_plan import Move, Part, each_byte_once, part, whole
from autotp_plan.planner.shards.folder_writer import check_workers, copy_of, stopped
from autotp_plan.planner.shards.resumable_folder import OutputFile, OutputFolder, Progress
from autotp_plan.schemas.errors import AutoTPError, Fault, ShardsError
from autotp_plan.schemas.plan.document import Parameter
from autotp_plan.schemas.shards.folder import Shards, read_shards
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME, ShardFile
from autotp_plan.schemas.shards.origin import copied_files, source_of
from autotp_plan.schemas.storage.byte_ranges import Segments
from autotp_plan.schemas.storage.checkpoint import INDEX_NAME, read_checkpoint
from autotp_plan.schemas.storage.plan_fit import parameter_faults
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, TensorEntry, parse_header, prefixed

_COPY_AGAIN = "copy the folder again, or pre-split again"


def merge(shards_folder: Path, output: Path, *, workers: int = 4, progress: Progress | None = None) -> int:
    """Write the checkpoint that `shards_folder` was cut from into the folder `output`; returns its size in bytes.

    `output` is a new folder, or one that an earlier attempt did not finish: that is continued. Raises ShardsError,
    CheckpointError, DocumentError or MismatchError.
    """
    check_workers("merge", workers)
    shards = read_shards(shards_folder)
    originals = [parse_header(output / file.name, file.header) for file in shards.manifest.source.files]
    copied = _copied(shards)
    targets = list(_targets(shards, _tensors(shards, originals, copied)))
    total = sum(target.segments.size for target in targets) + sum(file.size for _, file in copied)
    sizes = {file.path.name: file.size for file in originals} | {name: file.size for name, file in copied}
    task = {"command": "merge", "plan": shards.plan.fingerprint, "source": shards.manifest.source.fingerprint}
    if _is_finished(output, sizes, shards):
        return sum(sizes.values())
    with OutputFolder(output, task, "merge") as folder:
        try:
            folder.keep(sizes, workers, progress)
            batches = _batches(shards, originals, targets, copied, output)
            write_batches(batches, folder, total=total, workers=workers, progress=progress)
            folder.close()
        except (OSError, EOFError) as error:
            raise ShardsError(stopped(output, "merge", error)) from error
    return sum(sizes.values())


def _is_finished(output: Path, sizes: dict[str, int], shards: Shards) -> bool:
    """Whether `output` holds all of the checkpoint already: an earlier attempt was stopped as it ended."""
    try:
        if {path.name: path.stat().st_size for path in output.iterdir()} != sizes:
            return False
        return source_of(read_checkpoint(output)) == shards.manifest.source
    except (AutoTPError, OSError):
        return False


def check_whole(folder: Path, *, workers: int = 4, progress: Progress | None = None) -> Shards:
    """Verify every byte of the shards in `folder`, and that they make up the checkpoint that was cut.

    Raises ShardsError, CheckpointError, DocumentError or MismatchError with every fault found.
    """
    shards = read_shards(folder)
    originals = [parse_header(folder / file.name, file.header) for file in shards.manifest.source.files]
    _tensors(shards, originals, _copied(shards))
    shards.verify(workers, progress)
    return shards


def parts_of(parameter: Parameter, shards: Shards) -> tuple[Part, ...]:
    """Where the shards hold a parameter, every byte of it once."""
    layout = shards.plan.layouts[parameter.layout]
    held = []
    for rank in range(shards.plan.tp_size if layout.dim is not None else 1):
        segments = Segments.of(parameter.name, [shards.tensors[parameter.name, rank]])
        held.append(part(layout, layout.rank_intervals(rank), segments))
    return each_byte_once(held)


def _copied(shards: Shards) -> list[tuple[str, ShardFile]]:
    """As `copied_files`, with the name that each has in a checkpoint."""
    return [(INDEX_NAME if file.name == INDEX_COPY_NAME else file.name, file) for file in copied_files(shards)]


def _tensors(
    shards: Shards, originals: list[SafetensorsFile], copied: list[tuple[str, ShardFile]]
) -> dict[str, TensorEntry]:
    """The tensors of the original by name. Raises ShardsError unless the shards hold exactly these."""
    faults: list[Fault] = []
    names = [file.path.name for file in originals] + [name for name, _ in copied]
    faults += [
        _fault(name, "two files of this name", "every file once") for name in set(names) if names.count(name) > 1
    ]
    tensors: dict[str, TensorEntry] = {}
    for file in originals:
        for tensor in file.tensors:
            if tensor.name in tensors:
                faults.append(_fault(tensor.name, "two tensors of this name", "every tensor once"))
            tensors[tensor.name] = tensor
    left = dict(tensors)
    for parameter in shards.plan.expanded():
        found = list(parameter_faults(parameter, shards.plan.shape_of(parameter), tensors, _COPY_AGAIN))
        faults += found
        for name in parameter.names_on_disk():
            if left.pop(name, None) is None and not found:
                faults.append(_fault(name, "a tensor of two parameters", "every tensor once"))
    for name, tensor in left.items():
        kept = shards.unused.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            got = "no such tensor" if kept is None else f"{kept.dtype} of {list(kept.shape)}"
            faults.append(_fault(name, got, f"{tensor.dtype} of {list(tensor.shape)} in the shards"))
    for name in shards.unused.keys() - left.keys():
        faults.append(_fault(name, "a tensor that the original does not have", "the original's only"))
    if faults:
        raise ShardsError(faults)
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """A parameter, or a tensor that no rank reads (None), and where its bytes go."""

    parameter: Parameter | None
    segments: Segments

    def move(self, shards: Shards) -> Move:
        inputs: tuple[Part, ...]
        if self.parameter is None:
            inputs = (whole(Segments.of(self.segments.name, [shards.unused[self.segments.name]])),)
        else:
            inputs = parts_of(self.parameter, shards)
        return Move(size=self.segments.size, inputs=inputs, outputs=(whole(self.segments),))


def _targets(shards: Shards, tensors: dict[str, TensorEntry]) -> Iterator[_Target]:
    for parameter in shards.plan.expanded():
        names = parameter.names_on_disk()
        yield _Target(parameter=parameter, segments=Segments.of(parameter.name, [tensors[name] for name in names]))
    for name in shards.unused:
        yield _Target(parameter=None, segments=Segments.of(name, [tensors[name]]))


def _batches(
    shards: Shards,
    originals: list[SafetensorsFile],
    targets: list[_Target],
    copied: list[tuple[str, ShardFile]],
    output: Path,
) -> Iterator[Batch]:
    """Files that share a parameter are written together; in them, moves are in the order of the files."""
    together = {file.path: file.path for file in originals}

    def first(path: Path) -> Path:
        while together[path] != path:
            together[path] = together[together[path]]
            path = together[path]
        return path

    for target in targets:
        paths = sorted({first(path) for path in target.segments.files})
        together.update(dict.fromkeys(paths, paths[0]))
    grouped: dict[Path, list[_Target]] = defaultdict(list)
    for target in targets:
        grouped[first(target.segments.files[0])].append(target)
    files: dict[Path, list[SafetensorsFile]] = defaultdict(list)
    for file in originals:
        files[first(file.path)].append(file)
    for path, members in files.items():
        outputs = [
            OutputFile(name=file.path.name, header=prefixed(file.header.encode()), size=file.size) for file in members
        ]
        mine = sorted(grouped[path], key=lambda target: (target.segments.files[0], target.segments.positions[0]))
        moves = (target.move(shards) for target in mine)
        yield Batch(outputs=outputs, moves=moves, size=sum(target.segments.size for target in mine))
    for name, copy in copied:
        yield copy_of(shards.folder / copy.name, output / name, copy.size)


def _fault(where: str, got: str, expected: str) -> Fault:
    return Fault(
        what="the shards do not make up the checkpoint that their manifest describes",
        where=where,
        got=got,
        expected=expected,
        next=_COPY_AGAIN,
    )
