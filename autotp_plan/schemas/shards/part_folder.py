"""A shards folder that several processes fill at once, on one machine or several that share the file system.

Each part has a journal, which its writer locks. But not every shared file system locks between machines, so nothing
rests on the lock: a writer's temporary files have names of their own; a file with its final name is complete, is never
removed, and is only replaced by the same bytes; a part is complete when its record is there, which lists its files.
Whoever sees the records of all parts writes the manifest. Two who do so at once write the same bytes.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotp_plan.schemas.documents import sync_folder
from autotp_plan.schemas.errors import OutputError
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME, PLAN_NAME
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.shards.output_folder import (
    READ,
    FinishedFile,
    OutputFolder,
    journal_line,
    read_journal,
    read_stamps,
    size_on_disk,
)
from autotp_plan.schemas.shards.parts import Part, part_of, remove_part_files
from autotp_plan.schemas.storage.stamps import Stamps

_OPEN_ON_NFS = ".nfs"
"""How the names of files begin that were removed while a process had them open, until it closes them."""


class PartFolder(OutputFolder):
    """A folder to write one part of, locked against others who write the same part.

    Args:
        path: a new or empty folder, or one that is written in as many parts for the same task.
        task: as for `OutputFolder`.
        command: what messages call it.
        part: which part.
        shares: the files of each part, with their sizes in bytes.
    """

    without_locks = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

    def __init__(
        self, path: Path, task: Mapping[str, str], command: str, part: Part, shares: Sequence[Mapping[str, int]]
    ) -> None:
        super().__init__(path, {**task, "number of parts": str(part.count)}, command)
        self.part, self.shares = part, shares
        self.journal_name = part.journal_name
        self._token = secrets.token_hex(4)

    @property
    def is_finished(self) -> bool:
        """Whether the manifest is there. It comes when all parts are complete, and stays."""
        return MANIFEST_NAME in self._names()

    def begin(self, output: OutputFile) -> None:
        """Create a file of this folder under a temporary name that no other writer uses."""
        output.temporary = self.path / self.part.temporary_name(output.name, self._token)
        super().begin(output)

    def forget(self, names: Iterable[str]) -> None:
        """Remove complete files, and first the record that says that the part is complete."""
        (self.path / self.part.record_name).unlink(missing_ok=True)
        super().forget(names)

    def complete_part(self) -> None:
        """Say that this part is complete. Others may finish the folder from then on."""
        self.sync()
        files = (self.finished[name].entry(name) for name in self.shares[self.part.number - 1])
        read = () if self.read is None else ({READ: self.read},)
        self.write_small(self.part.record_name, b"".join(map(journal_line, (self.task, *read, *files))))
        self.sync()

    def gather(self) -> bool:
        """Take the files of all parts as finished; False when a part is not complete.

        Raises:
            OutputError: a part does not hold what it says.
        """
        found = [self._recorded(Part(number + 1, self.part.count)) for number in range(self.part.count)]
        complete = [files for files in found if files is not None]
        if len(complete) < len(found):
            return False
        names = self._names()
        for number, (files, share) in enumerate(zip(complete, self.shares), start=1):
            sizes = {name: file.size for name, file in files.items()}
            lost = [name for name, size in sizes.items() if name not in names or size_on_disk(self.path / name) != size]
            if lost or sizes != share:
                got = f"part {number} with {lost[0]} missing or changed" if lost else f"part {number} of other files"
                again = f"run {self.command} with --part {number}/{self.part.count} again"
                raise OutputError(self._fault(got, "the files that its record lists", again))
            self.finished.update(files)
        return True

    def read_by(self, part: Part) -> Stamps | None:
        """What a part that is complete was made of; None where that is not known."""
        return self._stamps_of(part.record_name)

    def complete(self) -> None:
        """The folder is finished: remove what parts left behind, and sync."""
        self.sync()
        remove_part_files(self.path)
        self.sync()
        sync_folder(self.path.parent)

    def _take_name(self, output: OutputFile) -> None:
        try:
            if self.is_finished:  # by another writer of this part: jobs may have mapped its files
                output.remove()
            else:
                output.take_name()
        except FileNotFoundError:
            if not self.is_finished:
                got, next_step = "another process has begun this part anew", "let only one process write a part"
                raise OutputError(self._fault(got, "one writer for each part", next_step)) from None

    def _read_journal(self, journal: Path) -> None:
        super()._read_journal(journal)
        recorded = self._recorded(self.part)
        if recorded is not None:
            self.finished.update(recorded)
            self.read = self.read_by(self.part) if self.read is None else self.read

    def _refuse_other_writers(self) -> None:
        """Refuse a folder that is finished, or is written by one process or in parts of another task."""
        names = self._names()
        for name, how in ((MANIFEST_NAME, "is finished"), (JOURNAL_NAME, "was begun without --part")):
            if name in names:
                expected, next_step = "a new folder, or one that is written in parts", "give another folder"
                if name == JOURNAL_NAME:
                    next_step = "finish it without --part, or remove the folder and start again"
                raise OutputError(self._fault(f"a folder that {how}", expected, next_step))
        for name in sorted(names):
            part = part_of(name)
            if part is not None and name in (part.journal_name, part.record_name):
                begun, _ = self._journal_of(name)
                self._refuse_another_task(self.task if begun is None else begun)

    def _refuse_others(self, names: Iterable[str]) -> None:
        super()._refuse_others({PLAN_NAME, MANIFEST_NAME, *(name for share in self.shares for name in share)})

    def _is_bookkeeping(self, name: str) -> bool:
        return part_of(name) is not None or name.startswith(_OPEN_ON_NFS)

    def _remove_unfinished(self) -> None:
        """Remove what earlier writers of this part left half done, and its record when it does not hold any more."""
        for name in self._names():
            if part_of(name) == self.part and name not in (self.journal_name, self.part.record_name):
                (self.path / name).unlink(missing_ok=True)
        recorded, share = self._recorded(self.part), self.shares[self.part.number - 1]
        if recorded is not None and not share.keys() == recorded.keys() == self.finished.keys():
            (self.path / self.part.record_name).unlink(missing_ok=True)

    def _recorded(self, part: Part) -> dict[str, FinishedFile] | None:
        """The files of a part that is complete; None for one that is not."""
        task, files = self._journal_of(part.record_name)
        return None if task is None else files

    def _journal_of(self, name: str) -> tuple[dict[str, Any] | None, dict[str, FinishedFile]]:
        try:
            return read_journal((self.path / name).read_bytes())
        except FileNotFoundError:
            return None, {}

    def _stamps_of(self, name: str) -> Stamps | None:
        try:
            return read_stamps((self.path / name).read_bytes())
        except FileNotFoundError:
            return None

    def _names(self) -> set[str]:
        return set(os.listdir(self.path)) if self.path.is_dir() else set()  # noqa: PTH208
