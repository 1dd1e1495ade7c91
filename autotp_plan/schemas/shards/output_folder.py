"""A folder that is written once, file by file, by one process at a time, and can be resumed after a stop.

While it is unfinished it holds a journal: on its first line what is being written, then a line for each file that is
complete. The journal is locked by whoever writes; the lock ends with the process. A file gets its final name when all
of its bytes are on disk and its checksum is in the journal. The journal goes last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from autotp_plan.schemas.documents import make_folder, sync_folder
from autotp_plan.schemas.errors import Fault, OutputError
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME
from autotp_plan.schemas.shards.output_file import FOR_ALL, OutputFile, temporary_path
from autotp_plan.schemas.shards.parts import find_parts
from autotp_plan.schemas.shards.stopped import next_step
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.stamps import Stamp, Stamps

READ = "read"


class FinishedFile(NamedTuple):
    """Size in bytes and CRC-32 of a complete file."""

    size: int
    crc32: int

    def entry(self, name: str) -> dict[str, Any]:
        """What the line of a journal says, `name` being that of the file."""
        return {"name": name, "size": self.size, "crc32": checksum.text(self.crc32)}


class OutputFolder:
    """A folder to write, locked while the block runs.

    Args:
        path: a new or empty folder, or one that an earlier attempt at the same task did not finish.
        task: what is written: a folder that was begun with another task is refused.
        command: what messages call it.

    Attributes:
        finished: the files that are complete.
        read: what earlier attempts have read, by name; None where that is not known.
        mode: who may read and write what `write_small` writes.
        remembered: what an earlier attempt had to `remember`.

    Raises:
        OutputError: on entering when the folder cannot be written to or holds anything else; on leaving when the
            operating system stopped the block.
    """

    journal_name = JOURNAL_NAME
    without_locks: tuple[int, ...] = (errno.ENOSYS, errno.ENOTSUP)
    """Errors of file systems that know no locks, such as some Lustre mounts: there it goes on without."""

    def __init__(self, path: Path, task: Mapping[str, str], command: str) -> None:
        self.path, self.task, self.command = path, dict(task), command
        self.finished: dict[str, FinishedFile] = {}
        self.read: Stamps | None = None
        self.mode = FOR_ALL
        self._lock = threading.Lock()
        self._begun: dict[str, OutputFile] = {}
        self.remembered: list[dict[str, Any]] = []
        self._journal = -1

    def __enter__(self) -> OutputFolder:
        try:
            self._enter()
        except OSError as error:
            raise OutputError(self._fault(error.strerror or str(error), "a folder that can be written to")) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for output in list(self._begun.values()):
            with contextlib.suppress(OSError):
                output.remove()
        os.close(self._journal)
        if isinstance(error, (OSError, EOFError)):
            raise OutputError(
                Fault(
                    code="stopped-by-operating-system",
                    what=f"{self.command} was stopped by the operating system",
                    where=str(self.path),
                    got=getattr(error, "strerror", None) or str(error),
                    expected="to read all of the input and write all of the output",
                    next=next_step(error, self.path, self.command),
                )
            ) from error

    def resume(self, sizes: Mapping[str, int], workers: int, progress: Progress | None = None) -> None:
        """Keep the files that an earlier attempt completed and that still are what they were; remove the others.

        Args:
            sizes: the bytes of all files that there will be, by name; -1 for those that are always written again.
            workers: threads that read.
            progress: called with the bytes verified and the bytes to verify.

        Raises:
            OutputError: the folder holds anything else.
        """
        self._refuse_others(sizes)
        known = {
            self.path / name: size
            for name, size in sizes.items()
            if name in self.finished and self.finished[name].size == size and size_on_disk(self.path / name) == size
        }
        found = checksum.of_files(known, workers=workers, progress=progress)
        self.finished = {
            path.name: self.finished[path.name] for path, crc in found.items() if crc == self.finished[path.name].crc32
        }
        self._remove_unfinished()

    def restart(self, names: Iterable[str]) -> None:
        """Remove all files that an earlier attempt wrote. `names` are those that there will be. Raises as `resume`."""
        self._refuse_others(names)
        self.finished, self.remembered = {}, []
        os.truncate(self._journal, 0)
        self._note(self.task)
        self._remove_unfinished()

    def forget(self, names: Iterable[str]) -> None:
        """Remove complete files, which are then written again."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
            del self.finished[name]
        self.sync()

    def note_read(self, stamps: Stamps) -> None:
        """Note what is read from now on; all that is complete must have been made of it."""
        if stamps != self.read:
            self.read = dict(stamps)
            self._note({READ: stamps})

    def begin(self, output: OutputFile) -> None:
        """Create a file of this folder under its temporary name."""
        self._begun[output.name] = output
        output.create()

    def finish(self, output: OutputFile) -> None:
        """Sync a file that is open and complete, and give it its name."""
        output.sync()
        found = FinishedFile(output.size, output.crc32())
        self._note(found.entry(output.name))
        self._take_name(output)
        with self._lock:
            self.finished[output.name] = found
            del self._begun[output.name]
        output.blocks.clear()
        output.close()

    def write_small(self, name: str, data: bytes) -> None:
        """Write a file at once, unless it is there already."""
        if name not in self.finished:
            output = OutputFile(self.path / name, len(data), data, self.mode)
            self.begin(output)
            self.finish(output)

    def remember(self, entry: Mapping[str, Any]) -> None:
        """Note something for an attempt that resumes, of the file that is read and `entry` calls `hashed`."""
        self._note(entry)

    def complete(self) -> None:
        """The folder is finished: remove the journal, and sync."""
        self.sync()
        (self.path / self.journal_name).unlink()
        self.sync()
        sync_folder(self.path.parent)  # an earlier attempt may have made the folder, and been killed before this

    def sync(self) -> None:
        """Bring the names of the files to disk."""
        sync_folder(self.path)

    def _take_name(self, output: OutputFile) -> None:
        output.take_name()

    def _refuse_others(self, names: Iterable[str]) -> None:
        ours = {known for name in (*names, *self.finished) for known in (name, temporary_path(self.path / name).name)}
        others = sorted(path.name for path in self.path.iterdir() if path.name not in ours)
        others = [name for name in others if not self._is_bookkeeping(name)]
        if others:
            fault = self._fault(", ".join(others[:3]), "only what an earlier attempt wrote", "move it somewhere else")
            raise OutputError(fault)

    def _is_bookkeeping(self, name: str) -> bool:
        return name == self.journal_name

    def _remove_unfinished(self) -> None:
        for path in self.path.iterdir():
            if path.name not in self.finished and path.name != self.journal_name:
                path.unlink()

    def _enter(self) -> None:
        journal = self.path / self.journal_name
        is_new = not journal.exists()
        self._refuse_other_writers()
        if is_new:
            self._refuse_what_is_there()
            if not self.path.is_dir():
                make_folder(self.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._journal = os.open(journal, flags, 0o666)
        try:
            self._lock_journal(journal)
            try:
                self._read_journal(journal)
                self._refuse_other_writers()  # again: one that began at the same moment
            except BaseException:
                if is_new:
                    journal.unlink(missing_ok=True)
                raise
        except BaseException:
            os.close(self._journal)
            raise

    def _lock_journal(self, journal: Path) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fault = self._fault("another process writes it", "one at a time", "wait for it, or stop it")
            raise OutputError(fault) from None
        except OSError as error:
            if error.errno not in self.without_locks:
                raise
        if not journal.exists() or os.fstat(self._journal).st_ino != journal.stat().st_ino:
            raise OutputError(self._just_finished())

    def _read_journal(self, journal: Path) -> None:
        data = journal.read_bytes()
        if not data and self.journal_name == JOURNAL_NAME and (self.path / MANIFEST_NAME).exists():
            journal.unlink()  # this process made it, when the other one had removed its own
            raise OutputError(self._just_finished())
        task, self.finished = read_journal(data)
        self.read = read_stamps(data)
        lines = map(_parsed, data.split(b"\n")[:-1])
        self.remembered = [line for line in lines if isinstance(line, dict) and "hashed" in line]
        if data and not data.endswith(b"\n"):
            os.write(self._journal, b"\n")  # ends a line that was half written
        if task is None:
            self._note(self.task)
        else:
            self._refuse_another_task(task)

    def _just_finished(self) -> Fault:
        return self._fault("another process has just finished it", "a new folder", "use what is there")

    def _refuse_another_task(self, begun: Mapping[str, Any]) -> None:
        if begun != self.task:
            other = sorted(key for key in {*begun, *self.task} if begun.get(key) != self.task.get(key))
            raise OutputError(
                self._fault(
                    "a folder that was begun with another " + ", ".join(other),
                    "the same as now: " + ", ".join(f"{key} {self.task.get(key)}" for key in other),
                    "finish it with what it was begun with, or remove the folder and start again",
                )
            )

    def _refuse_other_writers(self) -> None:
        """Refuse a folder that is written in parts."""
        found = find_parts(self.path)
        if found is not None:
            commands = ", ".join(f"--part {number}/{found.count}" for number in found.missing[:3]) or "any --part"
            raise OutputError(
                self._fault(
                    f"a folder that was begun in {found.count} parts",
                    "a new folder",
                    f"finish it with {commands}, or remove the folder and start again",
                )
            )

    def _refuse_what_is_there(self) -> None:
        if self.path.is_symlink() or self.path.exists():
            if not self.path.is_dir():
                raise OutputError(self._fault("a file", "a new folder", "give another folder"))
            names = sorted(path.name for path in self.path.iterdir())
            if names and not any(map(self._is_bookkeeping, names)):  # else: begun by another at this moment
                got = "a folder that is not empty: " + ", ".join(names[:3])
                expected = "a new folder, or one that an earlier attempt did not finish"
                raise OutputError(self._fault(got, expected, "give another folder, or remove this one"))

    def _note(self, entry: Mapping[str, Any]) -> None:
        line = journal_line(entry)
        with self._lock:
            written = os.write(self._journal, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._journal)

    def _fault(self, got: str, expected: str, next_step: str = "correct it and run the command again") -> Fault:
        what = f"{self.command} cannot write here"
        return Fault(
            code="folder-not-writable", what=what, where=str(self.path), got=got, expected=expected, next=next_step
        )


def read_journal(data: bytes) -> tuple[dict[str, Any] | None, dict[str, FinishedFile]]:
    """What a journal says: the task, None where there is none yet, and the files that are complete, by name.

    Lines that were half written are passed over.
    """
    task: dict[str, Any] | None = None
    finished: dict[str, FinishedFile] = {}
    for text in data.split(b"\n")[:-1]:
        line = _parsed(text)
        if not isinstance(line, dict):
            continue
        if task is None and "crc32" not in line:
            task = line
        elif task is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                finished[line["name"]] = FinishedFile(line["size"], int(line["crc32"], 16))
    return task, finished


def read_stamps(data: bytes) -> Stamps | None:
    """What a journal says of what was read last; None where it says nothing."""
    found: Stamps | None = None
    for line in map(_parsed, data.split(b"\n")[:-1]):
        if isinstance(line, dict) and isinstance(line.get(READ), dict):
            with contextlib.suppress(TypeError):
                found = {name: Stamp(*stamp) for name, stamp in line[READ].items()}
    return found


def journal_line(entry: Mapping[str, Any]) -> bytes:
    """A line of a journal."""
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def size_on_disk(path: Path) -> int:
    """The size of a file in bytes; -1 where there is none, or a link."""
    try:
        return -1 if path.is_symlink() else path.stat().st_size
    except OSError:
        return -1
