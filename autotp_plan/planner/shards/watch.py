"""A source that changes: between two attempts, while it is read, or after all was made of it.

What was made of a file that changed is compared with what the file holds now, byte by byte, so that a source that was
only touched or copied somewhere else is the same, and no folder is ever made of two states of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.planner.copying.compare import differing_bytes
from autotp_plan.planner.copying.copy_plan import FileGroup
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, Fault
from autotp_plan.schemas.names import some
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import ShardsFolder, read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from autotp_plan.schemas.shards.origin import Original, original_of_checkpoint, unreadable
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.files import File, MadeFile, is_far, local_files
from autotp_plan.schemas.storage.stamps import Stamps, WatchedFiles
from autotp_plan.sources.model_folder import ModelFolder, open_checkpoint
from autotp_plan.sources.torch_files.torch_checkpoint import TORCH_INDEX_NAME

Groups = Callable[[], Iterable[FileGroup]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Watches what a command reads.

    Attributes:
        files: the files of this machine that it reads.
        is_same: whether the source, read anew, has the names, headers and settings that it had.
        command: what messages call it.
        workers: threads that compare.
        progress: called with the bytes compared and the bytes to compare.
    """

    files: WatchedFiles
    is_same: Callable[[], bool]
    command: str
    workers: int
    progress: Progress | None

    def resume(self, folder: OutputFolder, groups: Groups, notes: Callable[[str], None]) -> None:
        """Forget complete files that do not hold what the source holds now, and note what is read from now on.

        Args:
            folder: what was begun.
            groups: how it is filled.
            notes: told of the files that are written again.

        Raises:
            OSError, EOFError: a file cannot be read.
        """
        changed = self.files.differing(folder.read)
        wrong = self.differing(groups, folder.finished, changed) if changed and folder.finished else []
        if wrong:
            folder.forget(wrong)
            files = "1 file" if len(wrong) == 1 else f"{len(wrong)} files"
            notes(f"{files} in {folder.path} written again, as what they are made of has changed: {some(wrong)}")
        folder.note_read(self.files.stamps)

    def finish(self, folder: OutputFolder, groups: Groups, names: Collection[str]) -> None:
        """Make sure that all was made of one state of the source.

        Args:
            folder: what was written.
            groups: how it was filled.
            names: the files to look at.

        Raises:
            CheckpointError: the source changed while it was read.
            OSError, EOFError: a file cannot be read.
        """
        changed = self.files.changed()
        if not changed:
            return
        if not self.is_same() or self.differing(groups, names, changed):
            raise CheckpointError(_changed(self.command, sorted(changed), folder.path))

    def differing(self, groups: Groups, names: Collection[str], changed: Collection[str] | None = None) -> list[str]:
        """The files among `names` that hold other bytes than the source, as far as it is on this machine.

        Args:
            groups: how files are filled.
            names: the files to compare.
            changed: compare only what is made of these files; None for all.

        Raises:
            OSError, EOFError: a file cannot be read.
        """

        def touched() -> Iterator[FileGroup]:
            for group in groups():
                sources = _sources(group)
                if any(map(is_far, sources)):
                    continue
                if changed is None or any(_is_among(file, changed) for file in sources):
                    yield group

        found = differing_bytes(touched, names, workers=self.workers, progress=self.progress)
        return sorted(path.name for path in found)

    def with_modes(self, groups: Iterable[FileGroup]) -> Iterator[FileGroup]:
        """The groups, with files that only those may read who may read all that they are made of."""
        for group in groups:
            mode = self.files.strictest_mode(name for file in _sources(group) for name in self._names(file))
            for output in group.files:
                output.mode = mode
            yield group

    def _names(self, file: File) -> Iterable[str]:
        """The files that a file is made of; of one in memory the one that it replaces, or else all."""
        if _is_made(file):
            return (file.name,) if file.name in self.files.stamps else self.files.stamps
        return (path.name for path in local_files(file))


def _sources(group: FileGroup) -> set[File]:
    return {part.file for tensor in group.tensors for shard in tensor.sources for part in shard.ranges.ranges}


def _is_made(file: File) -> bool:
    return isinstance(file, MadeFile)


def _is_among(file: File, changed: Collection[str]) -> bool:
    """Whether a file is made of one that changed; one in memory may be made of any."""
    return _is_made(file) or any(path.name in changed for path in local_files(file))


def _changed(command: str, names: list[str], folder: Path) -> Fault:
    return Fault(
        code="source-changed",
        what="the source changed while it was read, and nothing was finished",
        where=str(folder),
        got=f"other bytes, size, time or place: {some(names)}",
        expected="files that stay as they are until the command has ended",
        next=f"run {command} again when nothing writes to them: what does not fit is written again",
    )


def watch_checkpoint(
    place: ModelFolder,
    checkpoint: Checkpoint,
    original: Original,
    before: Stamps,
    command: str,
    *,
    plan: Plan | None = None,
    checksums: bool = False,
    workers: int = 4,
    progress: Progress | None = None,
) -> Watch:
    """Watch a checkpoint.

    Args:
        place: where it is.
        checkpoint: its headers.
        original: what is copied of it as it is, and its fingerprint.
        before: the stamps of its folder, taken before anything was read.
        command: what messages call what reads it.
        plan: the plan that it is sharded by; None for one that is copied.
        checksums: tell its states apart by the checksums of all bytes too.
        workers: threads that read for that.
        progress: called with the bytes read for that and the bytes in all.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def is_same() -> bool:
        try:
            again = open_checkpoint(place, None if plan is None else plan.dequantized_dtype)
            now = original_of_checkpoint(again, plan)
        except (AutoTPError, OSError, EOFError):
            return False
        return (again.config, now.source, _sizes(now)) == (checkpoint.config, original.source, _sizes(original))

    read = [path for file in checkpoint.files for path in local_files(file.path)]
    read += [path for file in original.copied for path in local_files(file.path)]
    read += [place.folder / name for name in (CONFIG_NAME, INDEX_NAME, TORCH_INDEX_NAME) if name in before]
    try:
        files = WatchedFiles(read, before, checksums=checksums, workers=workers, progress=progress)
    except (OSError, EOFError) as error:
        raise CheckpointError(unreadable(error, checkpoint.folder)) from error
    return Watch(files=files, is_same=is_same, command=command, workers=workers, progress=progress)


def watch_shards(shards: ShardsFolder, before: Stamps, command: str, workers: int, progress: Progress | None) -> Watch:
    """Watch the files of a shards folder. `before` and the others are as for `watch_checkpoint`."""

    def is_same() -> bool:
        try:
            return read_shards(shards.path).manifest == shards.manifest
        except (AutoTPError, OSError):
            return False

    names = [*(file.name for file in shards.manifest.files), MANIFEST_NAME]
    files = WatchedFiles([shards.path / name for name in names], before)
    return Watch(files=files, is_same=is_same, command=command, workers=workers, progress=progress)


def _sizes(original: Original) -> list[tuple[str, int]]:
    return [(file.name, file.size) for file in original.copied]
