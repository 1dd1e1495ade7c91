"""From shards back to the checkpoint that they were split from: the same files, to the byte.

Headers come from the manifest as they were, so file split, tensor names, dtypes and metadata are the original's, and a
file has the checksum it had on the hub. The small files next to the weights come back too; what `presplit` did not copy
(pickles, folders, hidden files) does not.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from autotp_plan.planner.copying.copy_engine import write_groups
from autotp_plan.planner.copying.copy_plan import (
    FileGroup,
    TensorCopy,
    file_copy,
    full_tensor,
    matrices_on_disk,
    stored_shards,
)
from autotp_plan.planner.shards.folder_writer import Notes, check_options, nobody, refuse_if_source_changed
from autotp_plan.planner.shards.same_checkpoint import check_same_checkpoint
from autotp_plan.planner.shards.watch import watch_shards
from autotp_plan.schemas.errors import AutoTPError, Fault, ShardsError
from autotp_plan.schemas.shards.folder import ShardsFolder, read_shards
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME, Source
from autotp_plan.schemas.shards.origin import copied_files, source_of
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.shards.small_files import CopiedFile
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.checkpoint import INDEX_NAME, read_checkpoint
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.files import ByteRange, File, local_path
from autotp_plan.schemas.storage.plan_fit import parameter_faults
from autotp_plan.schemas.storage.safetensors_header import (
    CONVERTED_FROM,
    SafetensorsFile,
    TensorEntry,
    parse_header,
    prefixed,
)
from autotp_plan.schemas.storage.stamps import stamps_in
from autotp_plan.sources.model_folder import Place

_COPY_AGAIN = "copy the folder again, or pre-split again"


def merge(
    shards_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    workers: int = 4,
    progress: Progress | None = None,
    notes: Notes = nobody,
) -> int:
    """Write the checkpoint that shards were split from; returns its size in bytes.

    Args:
        shards_folder: the shards.
        output: a new folder, or one that an earlier attempt did not finish: that is resumed.
        workers: reads and writes at the same time.
        progress: called with the bytes read and the bytes in all, from worker threads.
        notes: called with what a user should know, one sentence at a time.

    Raises:
        ShardsError: the folder is not what its manifest and plan say, or does not make up the checkpoint.
        DocumentError: its manifest or plan cannot be read.
        MismatchError: its shards are of another plan than the one in it.
        CheckpointError: a header of the checkpoint in its manifest is broken, or the shards changed while they were
            read.
        OptionError: `workers` is not positive.
        OutputError: `output` cannot be written, the operating system stopped the command, or `output` is finished and
            the shards have changed since.
    """
    check_options("merge", workers)
    output = Path(output)
    before = stamps_in(Path(shards_folder))
    shards = read_shards(Path(shards_folder))
    originals = [parse_header(output / file.name, file.header) for file in shards.manifest.source.files]
    copied = _copied(shards)
    tensors = list(_copies(shards, _tensors(shards, originals, copied)))
    total = sum(tensor.size for tensor in tensors) + sum(file.size for file in copied)
    sizes = {file.path.name: file.size for file in originals} | {file.name: file.size for file in copied}
    task = {"command": "merge", "plan": shards.plan.fingerprint, "source": shards.manifest.source.fingerprint}
    watch = watch_shards(shards, before, "merge", workers, progress)

    def groups() -> Iterator[FileGroup]:
        small = (file_copy(file.path, output / file.name, file.size) for file in copied)
        return watch.with_modes(itertools.chain(_groups(originals, tensors), small))

    if is_finished(output, sizes, shards.manifest.source, "merge", lambda names: watch.differing(groups, names)):
        return sum(sizes.values())
    with OutputFolder(output, task, "merge") as folder:
        folder.resume(sizes, workers, progress)
        watch.resume(folder, groups, notes)
        write_groups(groups(), folder, total=total, workers=workers, progress=progress)
        watch.finish(folder, groups, sizes)
        folder.complete()
    return sum(sizes.values())


def converted_from(shards: ShardsFolder) -> list[str]:
    """The files of `torch.save` that the checkpoint was read from; empty where it was of safetensors."""
    files = shards.manifest.source.files
    headers = (parse_header(shards.path / file.name, file.header).metadata or {} for file in files)
    return [metadata[CONVERTED_FROM] for metadata in headers if CONVERTED_FROM in metadata]


def is_finished(
    output: Path,
    sizes: dict[str, int],
    source: Source,
    command: str,
    differing: Callable[[Collection[str]], list[str]],
) -> bool:
    """Whether `output` holds all of a checkpoint already: an earlier attempt was stopped as it ended.

    Args:
        output: the folder.
        sizes: the sizes of the files that the command writes.
        source: of the checkpoint that it writes.
        command: what messages call it.
        differing: the files, among those of these names, that hold other bytes than the command would write.

    Raises:
        OutputError: it holds these files, as they were made of what the source held before.
    """
    try:
        found = {path.name: path.stat().st_size for path in output.iterdir()}
        if not found or found.keys() != sizes.keys():
            return False
        other_sizes = {name for name, size in sizes.items() if found[name] != size}
        wrong = sorted({*other_sizes, *differing(sizes.keys() - other_sizes)})
        finished = source_of(read_checkpoint(output)) == source
    except (AutoTPError, OSError, EOFError):
        return False
    refuse_if_source_changed(wrong, output, command)
    return finished


def check_shards(
    folder: str | os.PathLike[str],
    *,
    checkpoint: Place | None = None,
    workers: int = 4,
    progress: Progress | None = None,
) -> ShardsFolder:
    """Verify every byte of a shards folder, and that it makes up the checkpoint it was split from.

    Args:
        folder: the shards.
        checkpoint: compare every byte with those of this checkpoint too, wherever it is.
        workers: threads that read.
        progress: called with the bytes read and the bytes in all; once more from the beginning for `checkpoint`.

    Raises:
        ShardsError: the folder is not what its manifest and plan say, or does not make up the checkpoint; or it holds
            other bytes than `checkpoint`.
        DocumentError: its manifest or plan cannot be read.
        MismatchError: its shards are of another plan than the one in it.
        CheckpointError: a header of the checkpoint in its manifest is broken, or `checkpoint` cannot be read.
    """
    folder = Path(folder)
    shards = read_shards(folder)
    originals = [parse_header(folder / file.name, file.header) for file in shards.manifest.source.files]
    _tensors(shards, originals, _copied(shards))
    shards.verify(workers, progress)
    if checkpoint is not None:
        check_same_checkpoint(shards, checkpoint, workers=workers, progress=progress)
    return shards


def _copied(shards: ShardsFolder) -> list[CopiedFile]:
    """The files that are copied as they are, with the names that they have in a checkpoint."""
    return [
        CopiedFile(INDEX_NAME if file.name == INDEX_COPY_NAME else file.name, shards.path / file.name, file.size)
        for file in copied_files(shards)
    ]


def _tensors(
    shards: ShardsFolder, originals: list[SafetensorsFile], copied: list[CopiedFile]
) -> dict[str, TensorEntry]:
    """The tensors of the original by name. Raises ShardsError unless the shards hold exactly these."""
    names = [file.path.name for file in originals] + [file.name for file in copied]
    faults = [_fault(name, "two files of this name", "every file once") for name in names if names.count(name) > 1]
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
    faults += _unused_faults(left, shards)
    if faults:
        raise ShardsError(faults)
    return tensors


def _unused_faults(tensors: dict[str, TensorEntry], shards: ShardsFolder) -> Iterator[Fault]:
    """Where the shards do not keep `tensors`, those of the original that are no parameter's."""
    for name, tensor in tensors.items():
        kept = shards.unused.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            got = "no such tensor" if kept is None else f"{kept.dtype} of {list(kept.shape)}"
            yield _fault(name, got, f"{tensor.dtype} of {list(tensor.shape)} in the shards")
    for name in shards.unused.keys() - tensors.keys():
        yield _fault(name, "a tensor that the original does not have", "the original's only")


def _copies(shards: ShardsFolder, tensors: dict[str, TensorEntry]) -> Iterator[TensorCopy]:
    """Every parameter, and every tensor that no rank reads: from the shards to where it lies in the original."""
    for parameter in shards.plan.expanded():
        target = ByteRanges.of([tensors[name] for name in parameter.names_on_disk()])
        on_disk = matrices_on_disk(parameter, shards.plan.shape_of(parameter))
        matrices = None if on_disk is None else on_disk.transposed()
        yield TensorCopy(target.size, stored_shards(parameter, shards), (full_tensor(target),), matrices)
    for name, kept in shards.unused.items():
        target = ByteRanges.of([tensors[name]])
        yield TensorCopy(target.size, (full_tensor(ByteRanges.of([kept])),), (full_tensor(target),))


def _groups(originals: list[SafetensorsFile], tensors: list[TensorCopy]) -> Iterator[FileGroup]:
    """Files that share a parameter are written together; in them, tensors are in the order of the files."""
    together = {file.path: file.path for file in originals}

    def first(path: File) -> File:
        while together[path] != path:
            together[path] = together[together[path]]
            path = together[path]
        return path

    for tensor in tensors:
        paths = sorted({first(part.file) for part in _target_ranges(tensor)}, key=str)
        together.update(dict.fromkeys(paths, paths[0]))
    grouped: dict[File, list[TensorCopy]] = defaultdict(list)
    for tensor in sorted(tensors, key=_target_ranges):
        grouped[first(_target_ranges(tensor)[0].file)].append(tensor)
    files: dict[File, list[OutputFile]] = defaultdict(list)
    for file in originals:
        files[first(file.path)].append(OutputFile(local_path(file.path), file.size, prefixed(file.header.encode())))
    for path, outputs in files.items():
        yield FileGroup(outputs, grouped[path])


def _target_ranges(tensor: TensorCopy) -> tuple[ByteRange, ...]:
    return tensor.targets[0].ranges.ranges


def _fault(where: str, got: str, expected: str) -> Fault:
    return Fault(
        code="shards-without-checkpoint",
        what="the shards do not make up the checkpoint that their manifest describes",
        where=where,
        got=got,
        expected=expected,
        next=_COPY_AGAIN,
    )
