"""A folder that is written once, file by file, by one process at a time, and goes on where an earlier one stopped.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from autotp_plan.schemas.errors import Fault, ShardsError
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME
from autotp_plan.schemas.storage import checksum

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from any thread, but never from two at once."""


@dataclass(kw_only=True)
class OutputFile:
    """A file to write: its name, its header, and how many bytes it has with that."""

    name: str
    header: bytes
    size: int
    left: int = 0
    descriptor: int = -1
    pieces: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Size and CRC-32 of a complete file."""

    size: int
    crc32: int


class OutputFolder:
    """The folder `path`, locked while the block runs.

    `task` says what is written there: a folder that was begun with another is refused, and so is one that holds
    anything else. Raises ShardsError.
    """

    def __init__(self, path: Path, task: Mapping[str, str], command: str) -> None:
        self.path, self.task, self.command = path, dict(task), command
        self.finished: dict[str, Finished] = {}
        self._lock = threading.Lock()
        self._open: dict[str, OutputFile] = {}
        self._journal = -1

    def __enter__(self) -> OutputFolder:
        try:
            self._enter()
        except OSError as error:
            raise ShardsError(self._fault(error.strerror or str(error), "a folder that can be written to")) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for output in list(self._open.values()):
            self.drop(output)
        os.close(self._journal)

    def keep(self, sizes: Mapping[str, int], workers: int, progress: Progress | None = None) -> None:
        """Of the files that an earlier attempt completed, keep those that still are what they were; remove the others.

        `sizes` are all files that there will be; `progress` counts what is verified. Raises ShardsError when the folder
        holds anything else.
        """
        ours = {JOURNAL_NAME, *sizes, *(self._temporary(name).name for name in sizes)}
        foreign = sorted(path.name for path in self.path.iterdir() if path.name not in ours)
        if foreign:
            fault = self._fault(", ".join(foreign[:3]), "only what an earlier attempt wrote", "move it somewhere else")
            raise ShardsError(fault)
        known = {
            self.path / name: size
            for name, size in sizes.items()
            if name in self.finished and self.finished[name].size == size and _size(self.path / name) == size
        }
        found = checksum.of_files(known, workers=workers, progress=progress)
        self.finished = {
            path.name: self.finished[path.name] for path, crc in found.items() if crc == self.finished[path.name].crc32
        }
        for path in self.path.iterdir():
            if path.name not in self.finished and path.name != JOURNAL_NAME:
                path.unlink()

    def begin(self, output: OutputFile) -> None:
        """Make the file under a temporary name, with its header."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        output.descriptor = os.open(self._temporary(output.name), flags, 0o666)
        self._open[output.name] = output
        output.left = output.size
        self.write(output, memoryview(output.header), 0)
        os.truncate(output.descriptor, output.size)

    def write(self, output: OutputFile, data: memoryview, position: int) -> None:
        """Write bytes of a file that was begun."""
        crc, length, at = checksum.of_bytes(data), len(data), position
        while data:
            written = os.pwritev(output.descriptor, [data], at)
            data, at = data[written:], at + written
        if hasattr(os, "posix_fadvise"):  # Linux begins to write it to disk, so that the sync at the end finds little
            os.posix_fadvise(output.descriptor, position, length, os.POSIX_FADV_DONTNEED)
        with self._lock:
            output.pieces.append((position, length, crc))
            output.left -= length

    def finish(self, output: OutputFile) -> None:
        """Sync a file that is complete, and give it its name."""
        assert output.left == 0, f"{output.name} lacks {output.left} bytes"
        os.fsync(output.descriptor)
        found = Finished(size=output.size, crc32=checksum.of_pieces(output.pieces, output.size))
        self._note({"name": output.name, "size": found.size, "crc32": checksum.text(found.crc32)})
        self._temporary(output.name).replace(self.path / output.name)
        with self._lock:
            self.finished[output.name] = found
            del self._open[output.name]
        output.pieces.clear()
        os.close(output.descriptor)

    def drop(self, output: OutputFile) -> None:
        """Remove a file that was begun."""
        self._open.pop(output.name, None)
        with contextlib.suppress(OSError):
            os.close(output.descriptor)
            self._temporary(output.name).unlink(missing_ok=True)

    def write_small(self, name: str, data: bytes) -> None:
        """Write a whole file at once, unless it is there already."""
        if name not in self.finished:
            output = OutputFile(name=name, header=data, size=len(data))
            self.begin(output)
            self.finish(output)

    def close(self) -> None:
        """The folder is finished: remove the journal, and sync."""
        self.sync()
        (self.path / JOURNAL_NAME).unlink()
        self.sync()

    def sync(self) -> None:
        """Bring the names of the files to disk."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _enter(self) -> None:
        journal = self.path / JOURNAL_NAME
        if not journal.exists():
            self._refuse_what_is_there()
            self.path.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(journal, flags, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fault = self._fault("another process writes it", "one at a time", "wait for it, or stop it")
                raise ShardsError(fault) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP):  # some Lustre mounts know no locks
                    raise
            if not journal.exists() or os.fstat(descriptor).st_ino != journal.stat().st_ino:
                fault = self._fault("another process has just finished it", "a new folder", "use what is there")
                raise ShardsError(fault)
            self._journal = descriptor
            self._read_journal(journal)
        except BaseException:
            os.close(descriptor)
            raise

    def _read_journal(self, journal: Path) -> None:
        lines = journal.read_bytes().split(b"\n")
        complete = [found for line in lines[:-1] if isinstance(found := _parsed(line), dict)]
        if not complete:
            os.truncate(self._journal, 0)
            self._note(self.task)
            return
        begun = complete[0]
        if begun != self.task:
            other = sorted(key for key in {*begun, *self.task} if begun.get(key) != self.task.get(key))
            raise ShardsError(
                self._fault(
                    "a folder that was begun with another " + ", ".join(other),
                    "the same as now: " + ", ".join(f"{key} {self.task.get(key)}" for key in other),
                    "finish it with what it was begun with, or remove the folder and start again",
                )
            )
        if lines[-1]:
            os.truncate(self._journal, len(b"\n".join(lines[:-1])) + 1)
        for line in complete[1:]:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                self.finished[line["name"]] = Finished(size=line["size"], crc32=int(line["crc32"], 16))

    def _refuse_what_is_there(self) -> None:
        if self.path.is_symlink() or self.path.exists():
            if not self.path.is_dir():
                raise ShardsError(self._fault("a file", "a new folder", "give another folder"))
            if any(self.path.iterdir()):
                expected = "a new folder, or one that an earlier attempt did not finish"
                raise ShardsError(
                    self._fault("a folder that is not empty", expected, "give another folder, or remove this one")
                )

    def _note(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            written = os.write(self._journal, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._journal)

    def _temporary(self, name: str) -> Path:
        return self.path / f".{name}.tmp"

    def _fault(self, got: str, expected: str, next_step: str = "correct it and run the command again") -> Fault:
        what = f"{self.command} cannot write here"
        return Fault(what=what, where=str(self.path), got=got, expected=expected, next=next_step)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _size(path: Path) -> int:
    try:
        return -1 if path.is_symlink() else path.stat().st_size
    except OSError:
        return -1
