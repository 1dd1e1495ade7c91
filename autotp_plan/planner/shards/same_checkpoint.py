"""Whether shards hold the bytes of a checkpoint: every tensor, the headers, and the small files."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from autotp_plan.planner.copying.compare import differing_bytes
from autotp_plan.planner.copying.copy_engine import FAR_CHUNK_BYTES
from autotp_plan.planner.copying.copy_plan import (
    FileGroup,
    StoredShard,
    TensorCopy,
    file_copy,
    full_tensor,
    matrices_on_disk,
)
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, ShardsError
from autotp_plan.schemas.names import some
from autotp_plan.schemas.plan.document import Parameter
from autotp_plan.schemas.shards.folder import ShardsFolder
from autotp_plan.schemas.shards.manifest import SourceFile
from autotp_plan.schemas.shards.origin import Original, copied_files, original_of_checkpoint, unreadable
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.checkpoint import Checkpoint
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.files import local_path
from autotp_plan.schemas.storage.plan_fit import checkpoint_faults
from autotp_plan.schemas.storage.safetensors_header import TensorEntry, item_size
from autotp_plan.sources.model_folder import Place, model_folder, open_checkpoint

MAX_SHOWN = 10


class Compared(NamedTuple):
    """What was compared: tensors and small files of the checkpoint, and their bytes."""

    tensors: int
    small_files: int
    size: int


def check_same_checkpoint(
    shards: ShardsFolder, checkpoint_folder: Place, *, workers: int = 4, progress: Progress | None = None
) -> Compared:
    """Compare every byte of a checkpoint with the shards of it.

    Args:
        shards: the shards.
        checkpoint_folder: the checkpoint: a folder, an id of the hub or a URL. From far away its weights are fetched
            once; those that are quantised are computed.
        workers: threads that read.
        progress: called with the bytes of the checkpoint that were read and its bytes in all, from worker threads.

    Raises:
        MismatchError: the checkpoint is not one of the plan of the shards.
        ShardsError: the shards hold something else: with the tensors and files that differ.
        CheckpointError: the checkpoint cannot be read.
    """
    place = model_folder(checkpoint_folder)
    checkpoint = open_checkpoint(place, shards.plan.dequantized_dtype)
    faults = checkpoint_faults(shards.plan, checkpoint)
    if faults:
        raise MismatchError(faults)
    place.complete()
    original = original_of_checkpoint(checkpoint, shards.plan)
    faults = [*_header_faults(shards, original.source.files), *_listing_faults(shards, original)]
    if faults:
        raise ShardsError(faults)
    tensors = _tensors(shards, checkpoint)
    size = sum(tensor.size for tensor in tensors) + sum(file.size for file in original.copied)
    try:
        found = differing_bytes(
            lambda: _groups(shards, original, tensors),
            workers=workers,
            progress=progress,
            chunk_bytes=FAR_CHUNK_BYTES if place.elsewhere else None,
        )
    except (OSError, EOFError) as error:
        raise CheckpointError(unreadable(error, checkpoint.folder)) from error
    if found:
        raise ShardsError(_byte_faults(shards, found))
    return Compared(tensors=len(checkpoint.tensors), small_files=len(original.copied), size=size)


def _header_faults(shards: ShardsFolder, files: tuple[SourceFile, ...]) -> Iterator[Fault]:
    """The files of the checkpoint whose headers the manifest has otherwise, or not at all."""
    ours, theirs = ({file.name: file.header for file in files_} for files_ in (shards.manifest.source.files, files))
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if names:
        yield _fault(some(names), "other headers, or files of other names", "the headers of the checkpoint's files")


def _listing_faults(shards: ShardsFolder, original: Original) -> Iterator[Fault]:
    """Small files, and tensors that no rank reads, that one has and not the other, or that have other sizes."""
    ours = {file.name: file.size for file in copied_files(shards)}
    theirs = {file.name: file.size for file in original.copied}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield _fault(name, _bytes(ours.get(name)), _bytes(theirs.get(name)))
    names = shards.unused.keys() ^ {tensor.name for tensor in original.unused}
    if names:
        yield _fault(some(sorted(names)), "in one of the two only", "the tensors that no rank reads")


def _tensors(shards: ShardsFolder, checkpoint: Checkpoint) -> list[TensorCopy]:
    """Every tensor: from the checkpoint to where it lies in the shards."""
    tensors = [_parameter(shards, checkpoint, parameter) for parameter in shards.plan.expanded()]
    for name, kept in shards.unused.items():
        source, target = (full_tensor(ByteRanges.of([tensor])) for tensor in (checkpoint.tensors[name], kept))
        tensors.append(TensorCopy(source.ranges.size, (source,), (target,)))
    return tensors


def _parameter(shards: ShardsFolder, checkpoint: Checkpoint, parameter: Parameter) -> TensorCopy:
    source = full_tensor(ByteRanges.of([checkpoint.tensors[name] for name in parameter.names_on_disk()]))
    layout = shards.plan.layouts[parameter.layout]
    targets: dict[tuple[object, int], StoredShard] = {}  # what all ranks read is there once
    for rank in range(shards.plan.tp_size):
        entry = shards.tensors[parameter.name, rank]
        copies = layout.shard_copies(rank, item_size(parameter.dtype))
        targets.setdefault((entry.file, entry.start), StoredShard(ByteRanges.of([entry]), copies))
    matrices = matrices_on_disk(parameter, shards.plan.shape_of(parameter))
    return TensorCopy(source.ranges.size, (source,), tuple(targets.values()), matrices)


def _groups(shards: ShardsFolder, original: Original, tensors: list[TensorCopy]) -> Iterator[FileGroup]:
    """The files of the shards, those with shards of the same tensors together."""
    sizes = {file.name: file.size for file in shards.manifest.files}
    together: dict[tuple[Path, ...], list[TensorCopy]] = defaultdict(list)
    for tensor in tensors:
        paths = {local_path(part.file) for target in tensor.targets for part in target.ranges.ranges}
        together[tuple(sorted(paths))].append(tensor)
    for files, of_files in together.items():
        yield FileGroup([OutputFile(path, sizes[path.name]) for path in files], of_files)
    for name, path, size in original.copied:
        yield file_copy(path, shards.path / name, size)


def _byte_faults(shards: ShardsFolder, found: dict[Path, list[int]]) -> Iterator[Fault]:
    """What differs: tensors by their names, and small files."""
    in_files: dict[Path, list[tuple[int, str]]] = defaultdict(list)
    named: list[tuple[str, TensorEntry]] = [(name, tensor) for (name, _), tensor in shards.tensors.items()]
    for name, tensor in [*named, *shards.unused.items()]:
        in_files[local_path(tensor.file)].append((tensor.start, name))
    wrong: dict[str, list[str]] = defaultdict(list)
    for path, places in found.items():
        starts = sorted(in_files[path])
        for place in places:
            index = bisect.bisect_right(starts, (place, "\U0010ffff")) - 1
            name = starts[index][1] if index >= 0 else path.name
            if path.name not in wrong[name]:
                wrong[name].append(path.name)
    for name in sorted(wrong)[:MAX_SHOWN]:
        files = [file for file in wrong[name] if file != name]
        yield _fault(name, f"other bytes{f' in {some(files)}' if files else ''}", "the bytes of the checkpoint")
    if len(wrong) > MAX_SHOWN:
        yield _fault(f"{len(wrong) - MAX_SHOWN} more", "other bytes", "the bytes of the checkpoint")


def _bytes(size: int | None) -> str:
    return "no such file" if size is None else f"{size} bytes"


def _fault(where: str, got: str, expected: str) -> Fault:
    return Fault(
        code="shards-of-other-bytes",
        what="the shards are not those of the checkpoint as it is now",
        where=where,
        got=got,
        expected=expected,
        next="give the checkpoint that they were made of, or presplit this one into a new folder; shards that a job "
        "saved hold what it has trained",
    )
