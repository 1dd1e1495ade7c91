"""A checkpoint whose bytes are not those of safetensors files (`pytorch_model.bin`), written as safetensors files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from autotp_plan.planner.copying.copy_engine import write_groups
from autotp_plan.planner.copying.copy_plan import FileGroup, TensorCopy, file_copy, full_tensor
from autotp_plan.planner.shards.folder_writer import Notes, check_options, nobody
from autotp_plan.planner.shards.merge import is_finished
from autotp_plan.planner.shards.watch import watch_checkpoint
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME
from autotp_plan.schemas.shards.origin import original_of_checkpoint
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.shards.small_files import CopiedFile
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.checkpoint import INDEX_NAME, Checkpoint
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.files import ByteRange
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, prefixed
from autotp_plan.schemas.storage.stamps import stamps_in
from autotp_plan.sources.model_folder import Place, model_folder, open_checkpoint


def convert(
    checkpoint_folder: Place,
    output: str | os.PathLike[str],
    *,
    workers: int = 4,
    progress: Progress | None = None,
    notes: Notes = nobody,
) -> int:
    """Write a checkpoint of `.bin` files as safetensors files; returns the size of the new folder in bytes.

    Every tensor has the name, shape, dtype and bytes that `torch.load(weights_only=True)` gives it. Tensors that share
    their memory (a tied head) are written under each name. The small files next to the weights are copied.

    Args:
        checkpoint_folder: the checkpoint: a folder, an id of the hub or a URL.
        output: a new folder, or one that an earlier attempt did not finish: that is resumed.
        workers: reads and writes at the same time.
        progress: called with the bytes read and the bytes in all, from worker threads.
        notes: called with what a user should know, one sentence at a time.

    Raises:
        CheckpointError: the checkpoint cannot be read, changed while it was read, or is of safetensors files already.
        OptionError: `workers` is not positive.
        OutputError: `output` cannot be written, the operating system stopped the command, or `output` is finished and
            the checkpoint has changed since.
    """
    check_options("convert", workers)
    output = Path(output)
    place = model_folder(checkpoint_folder)
    before = stamps_in(place.folder)
    checkpoint = open_checkpoint(place)
    if all(isinstance(file.path, Path) for file in checkpoint.files):
        raise CheckpointError(_nothing_to_convert(checkpoint))
    place.complete()
    original = original_of_checkpoint(checkpoint, None)
    for note in original.notes:
        notes(note)
    copied = [
        CopiedFile(INDEX_NAME if file.name == INDEX_COPY_NAME else file.name, file.path, file.size)
        for file in original.copied
    ]
    sizes = {file.path.name: file.size for file in checkpoint.files} | {file.name: file.size for file in copied}
    task = {"command": "convert", "source": original.source.fingerprint}
    watch = watch_checkpoint(place, checkpoint, original, before, "convert", workers=workers, progress=progress)

    def groups() -> Iterator[FileGroup]:
        weights = (_group(file, output / file.path.name) for file in checkpoint.files)
        small = (file_copy(file.path, output / file.name, file.size) for file in copied)
        return watch.with_modes(itertools.chain(weights, small))

    if is_finished(output, sizes, original.source, "convert", lambda names: watch.differing(groups, names)):
        return sum(sizes.values())
    with OutputFolder(output, task, "convert") as folder:
        folder.resume(sizes, workers, progress)
        watch.resume(folder, groups, notes)
        total = sum(file.size - _data(file).start for file in checkpoint.files) + sum(file.size for file in copied)
        write_groups(groups(), folder, total=total, workers=workers, progress=progress)
        watch.finish(folder, groups, sizes)
        folder.complete()
    return sum(sizes.values())


def _group(file: SafetensorsFile, target: Path) -> FileGroup:
    """A file, and its tensors as one string of bytes."""
    data = _data(file)
    sources, targets = (
        (full_tensor(ByteRanges((ByteRange(one, data.start, data.length),))),) for one in (file.path, target)
    )
    header = prefixed(file.header.encode("utf-8"))
    return FileGroup([OutputFile(target, file.size, header)], [TensorCopy(data.length, sources, targets)])


def _data(file: SafetensorsFile) -> ByteRange:
    """What comes after the header."""
    start = 8 + len(file.header.encode("utf-8"))
    return ByteRange(file.path, start, file.size - start)


def _nothing_to_convert(checkpoint: Checkpoint) -> Fault:
    return Fault(
        code="nothing-to-convert",
        what="the checkpoint is of safetensors files already",
        where=str(checkpoint.folder),
        got=", ".join(file.path.name for file in checkpoint.files[:3]),
        expected="pytorch_model.bin, or its index and the files it names, and no model.safetensors",
        next="use it as it is: every command reads it",
    )
