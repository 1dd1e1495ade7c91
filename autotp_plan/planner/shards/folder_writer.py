"""Writing a shards folder from files: a checkpoint, or shards of another plan.

From the same plan and checkpoint the folder is the same, to the byte, wherever the bytes come from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

from autotp_plan.planner.copying.copy_engine import write_groups
from autotp_plan.planner.copying.copy_plan import FileGroup, Matrices, StoredShard, TensorCopy, file_copy, full_tensor
from autotp_plan.planner.copying.in_source_order import InSourceOrder
from autotp_plan.planner.copying.source_check import Digests, SourceCheck
from autotp_plan.planner.copying.source_hash import source_hashes
from autotp_plan.planner.shards.watch import Watch
from autotp_plan.schemas.errors import AutoTPError, Fault, OptionError, OutputError
from autotp_plan.schemas.names import some
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.file_layout import PlacedFile
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME, PLAN_NAME, Manifest
from autotp_plan.schemas.shards.new_shards import NewShards
from autotp_plan.schemas.shards.origin import Original, copied_files
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.shards.part_folder import PartFolder
from autotp_plan.schemas.shards.parts import Part, remove_part_files
from autotp_plan.schemas.shards.small_files import is_weights
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.safetensors_header import item_size, num_bytes

Sources = Mapping[str, tuple[StoredShard, ...]]
"""Where the bytes of each parameter are, every byte once, by the name of the parameter."""

Notes = Callable[[str], None]
"""Is called with what a user should know, one sentence at a time."""


def nobody(note: str) -> None:
    """Nobody is told."""


NOTHING_KNOWN = Digests(files=(), expected=())
NOTHING_TRANSPOSED: Mapping[str, Matrices] = {}


def write_shards(
    plan: Plan,
    original: Original,
    sources: Sources,
    output: Path,
    command: str,
    *,
    max_file_bytes: int,
    workers: int,
    progress: Progress | None,
    watch: Watch,
    notes: Notes = nobody,
    matrices: Mapping[str, Matrices] = NOTHING_TRANSPOSED,
    part: Part | None = None,
    digests: Digests | None = None,
    chunk_bytes: int | None = None,
) -> Manifest | None:
    """Write the shards of a plan, or what is missing of them; returns the manifest.

    Args:
        plan: the plan.
        original: what is not sharded of the checkpoint.
        sources: where the parameters are.
        output: a new folder, or one that an earlier attempt did not finish.
        command: what messages call this, and what a folder must have been begun by.
        max_file_bytes: a file has at most as many bytes of tensors, or one tensor.
        workers: threads that copy.
        progress: called with the bytes copied and the bytes in all.
        watch: watches what is read.
        notes: called with what a user should know, one sentence at a time.
        matrices: what parameters are in `sources` that are transposed there.
        part: which part of the files to write; None for all.
        digests: what the files of the checkpoint must be, which is compared before the manifest is written.
        chunk_bytes: what is read at once, about; None for what is best of files of this machine.

    Returns:
        None when other parts are not complete: whoever completes the last one writes the manifest.

    Raises:
        CheckpointError: a file is not what `digests` says, or the source changed while it was read.
        OptionError: `workers` or `max_file_bytes` is not positive.
        OutputError: `output` cannot be written, or holds finished shards of a source that has changed since.
    """
    check_options(command, workers, max_file_bytes)
    new = NewShards(plan, original, max_file_bytes)
    shares = new.shares(1 if part is None else part.count)
    share = shares[0 if part is None else part.number - 1]

    def groups(names: Container[str] = share) -> Iterator[FileGroup]:
        return watch.with_modes(_groups(new, sources, matrices, output, names))

    finished = _finished(new, output, workers, share)
    if finished is not None:
        refuse_if_source_changed(watch.differing(groups, share), output, command)
        return finished
    refuse_if_source_changed(_otherwise(new, output), output, command)
    task = {
        "command": command,
        "plan": plan.fingerprint,
        "source": original.source.fingerprint,
        "file size": str(max_file_bytes),
    }

    def check() -> SourceCheck:
        return SourceCheck(new, digests or NOTHING_KNOWN, matrices, output, workers)

    def write(folder: OutputFolder, completed: Callable[[], None] = lambda: None) -> None:
        watch.resume(folder, groups, notes)
        folder.mode = watch.files.strictest_mode(filter(_describes, watch.files.stamps))
        total = _total(new, share)
        if digests is not None and digests.computed_from:
            hashes = source_hashes(digests.computed_from, folder.remembered)
            InSourceOrder(folder, hashes, workers=workers, total=total, progress=progress).write(groups())
        else:
            write_groups(
                groups(),
                folder,
                total=total,
                workers=workers,
                progress=progress,
                chunk_bytes=chunk_bytes,
                once=part is None,
                completed=completed,
            )
        watch.finish(folder, groups, share)

    if part is None:
        with OutputFolder(output, task, command) as folder, check() as checked:
            folder.resume(new.all_sizes(), workers, progress)
            write(folder, lambda: checked.advance(folder.finished))
            checked.finish(folder.finished)
            return new.finish(folder, original.source)
    of_part = PartFolder(output, task, command, part, shares)
    try:
        with of_part:
            of_part.resume(share, workers, progress)
            write(of_part)
            of_part.complete_part()
            if of_part.gather():
                _compare_parts(of_part, watch, groups)
                with check() as checked:
                    checked.finish(of_part.finished)
                return new.finish(of_part, original.source)
    except OutputError:
        finished = _finished(new, output, workers, share)
        if finished is None:
            raise
        return finished
    return _finished(new, output, workers, share)  # another process may have written the manifest meanwhile


def _describes(name: str) -> bool:
    """Whether a file of the source says what is in the plan and the manifest."""
    return is_weights(name) or name in (CONFIG_NAME, PLAN_NAME, MANIFEST_NAME)


def _compare_parts(folder: PartFolder, watch: Watch, groups: Callable[[Container[str]], Iterator[FileGroup]]) -> None:
    """Raise OutputError unless all parts were made of what the source is now."""
    for number, share in enumerate(folder.shares, start=1):
        part = Part(number, folder.part.count)
        changed = watch.files.differing(folder.read_by(part))
        if changed and (wrong := watch.differing(functools.partial(groups, share), share, changed)):
            raise OutputError(
                Fault(
                    code="part-of-another-source",
                    what="a part was made of another state of the source",
                    where=str(folder.path / wrong[0]),
                    got=f"part {number}, with other bytes than the source has now",
                    expected="all parts of one state of the source",
                    next=f"run {folder.command} with --part {number}/{folder.part.count} again: it writes again what "
                    "does not fit",
                )
            )


def refuse_if_source_changed(wrong: list[str], output: Path, command: str) -> None:
    """Raise OutputError where a finished folder has other bytes in the files `wrong` than its source has now."""
    if wrong:
        raise OutputError(
            Fault(
                code="source-changed-since",
                what="the folder is finished, and its source has changed since",
                where=str(output),
                got=f"other bytes in {some(wrong)}",
                expected="what the source holds now",
                next=f"remove the folder, or give another, and run {command} again; or give the source that it was "
                "made of",
            )
        )


MAX_WORKERS = 1024


def check_options(command: str, workers: int, max_file_bytes: int = 1) -> None:
    """Raise OptionError unless both numbers are positive, and `workers` is at most `MAX_WORKERS`."""
    if not 1 <= workers <= MAX_WORKERS or max_file_bytes < 1:
        raise OptionError(
            Fault(
                code="bad-number",
                what=f"{command} cannot run",
                where=command,
                got=f"workers {workers}, file size {max_file_bytes}",
                expected=f"positive numbers, and at most {MAX_WORKERS} workers",
                next=f"give numbers of at least 1, and --workers of at most {MAX_WORKERS}",
            )
        )


def _finished(new: NewShards, output: Path, workers: int, share: Mapping[str, int]) -> Manifest | None:
    """The manifest of `output` when it holds all of this already: an earlier attempt was stopped as it ended.

    Of the files those of `share` are verified.
    """
    try:
        if not (output / MANIFEST_NAME).exists() or (output / JOURNAL_NAME).exists():
            return None
        shards = read_shards(output, new.plan)
        sizes = {file.name: file.size for file in shards.manifest.files if file.name != PLAN_NAME}
        of_this = (shards.manifest.plan, shards.manifest.source) == (new.plan.fingerprint, new.original.source)
        if not of_this or sizes != new.sizes():
            return None
        shards.verify(workers, names={*share, PLAN_NAME})
        remove_part_files(output)
    except (AutoTPError, OSError):
        return None
    return shards.manifest


def _otherwise(new: NewShards, output: Path) -> list[str]:
    """What finished shards of the same plan have otherwise than the source: small files, or headers and weights."""
    try:
        if not (output / MANIFEST_NAME).exists() or (output / JOURNAL_NAME).exists():
            return []
        shards = read_shards(output, new.plan)
    except (AutoTPError, OSError):
        return []
    if shards.manifest.plan != new.plan.fingerprint:
        return []
    ours = {file.name: file.size for file in copied_files(shards)}
    theirs = {file.name: file.size for file in new.original.copied}
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    same_weights = shards.manifest.source == new.original.source
    return names if same_weights else [*names, *(file.name for file in new.original.source.files)]


def _total(new: NewShards, share: Mapping[str, int]) -> int:
    """The bytes that are read for the files of `share`, where none is complete."""
    sharded = sum(
        num_bytes(tensor.dtype, tensor.shape if tensor.parameter is None else new.plan.shape_of(tensor.parameter))
        for files in new.layout.groups()
        if any(file.name in share for file in files)
        for tensor in files[0].tensors
    )
    return sharded + sum(file.size for file in new.original.copied if file.name in share)


def _groups(
    new: NewShards, sources: Sources, matrices: Mapping[str, Matrices], folder: Path, share: Container[str]
) -> Iterator[FileGroup]:
    """The files of `share`, and how they are filled."""
    unused = {tensor.name: full_tensor(ByteRanges.of([tensor])) for tensor in new.original.unused}
    # what all ranks share first: something of every file of the checkpoint is in it
    for files in sorted(new.layout.groups(), key=lambda files: isinstance(files[0].owner, int)):
        outputs = [
            OutputFile(folder / file.name, file.size, file.header(new.original.source.fingerprint))
            for file in files
            if file.name in share
        ]
        if outputs:
            yield FileGroup(outputs, list(_tensors(new.plan, files, sources, matrices, unused, folder)))
    for name, path, size in new.original.copied:
        if name in share:
            yield file_copy(path, folder / name, size)


def _tensors(
    plan: Plan,
    files: list[PlacedFile],
    sources: Sources,
    matrices: Mapping[str, Matrices],
    unused: Mapping[str, StoredShard],
    folder: Path,
) -> Iterator[TensorCopy]:
    """The tensors of files that hold the ranks' shards of the same parameters."""
    ranges = [file.byte_ranges(folder) for file in files]
    for index, tensor in enumerate(files[0].tensors):
        if tensor.parameter is None:
            yield TensorCopy(tensor.size, (unused[tensor.name],), (full_tensor(ranges[0][index]),))
            continue
        layout = plan.layouts[tensor.parameter.layout]
        targets = tuple(
            StoredShard(of_file[index], layout.shard_copies(rank, item_size(tensor.dtype)))
            for rank, of_file in enumerate(ranges)
        )
        size = num_bytes(tensor.dtype, plan.shape_of(tensor.parameter))
        yield TensorCopy(size, sources[tensor.name], targets, matrices.get(tensor.name))
