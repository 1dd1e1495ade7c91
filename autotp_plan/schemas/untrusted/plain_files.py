"""Reading and writing small files whose paths a user or a stranger chose.

A pipe, a socket or a device may block for ever, never end, or be replaced by a file: nothing but plain files is read or
written here, links to them included. It does not know what is in a file.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import stat
import time
from pathlib import Path

NO_PLAIN_FILE = "no plain file"
PIPE_SECONDS = 60.0
"""How long a shell's pipe may give nothing."""


class TooLargeError(Exception):
    """A file has more bytes than were allowed. `size` is what is known of it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def read_plain(path: Path, most: int, shell_pipe: bool = False) -> bytes:
    """The bytes of a plain file, or of one that a link leads to.

    Args:
        path: the file.
        most: bytes that it may have.
        shell_pipe: read a pipe without a name too, which a shell makes of `<(command)`.

    Raises:
        OSError: it cannot be read, or is a pipe, a socket, a device or a folder.
        TooLargeError: it has more bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        pipe = shell_pipe and stat.S_ISFIFO(status.st_mode) and _is_nameless(path)
        if not stat.S_ISREG(status.st_mode) and not pipe:
            raise OSError(errno.EINVAL, NO_PLAIN_FILE, str(path))
        if status.st_size > most:
            raise TooLargeError(status.st_size)
        return _read(descriptor, most, pipe, path)
    finally:
        os.close(descriptor)


def _read(descriptor: int, most: int, pipe: bool, path: Path) -> bytes:
    """Until the end: files of /proc say that they are empty, and a file may grow."""
    found = bytearray()
    while True:
        if pipe and not select.select([descriptor], [], [], PIPE_SECONDS)[0]:
            raise TimeoutError(errno.ETIMEDOUT, f"a pipe that gave nothing for {PIPE_SECONDS:.0f} s", str(path))
        try:
            part = os.read(descriptor, 1 << 20)
        except BlockingIOError:
            time.sleep(0.01)  # a pipe that another process emptied first
            continue
        if not part:
            return bytes(found)
        found += part
        if len(found) > most:
            raise TooLargeError(len(found))


def _is_nameless(path: Path) -> bool:
    """Whether a path is of an open descriptor of this process, such as `/dev/fd/63`."""
    return os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd"


def not_plain(folder: Path) -> list[str]:
    """The names in a folder that are neither plain files nor folders, nor links to such: opening them may not end."""
    found = []
    for entry in os.scandir(folder):
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link that leads nowhere
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            found.append(entry.name)
    return sorted(found)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or all of the new, synced to disk.

    A link stays, and what it points to is written. A file that is replaced keeps who may read it.

    Raises:
        OSError: it cannot be written, or is no plain file but a device or pipe; what was there stays.
    """
    path = Path(os.path.realpath(path))
    mode = None
    if os.path.lexists(path):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"it is there, and is {NO_PLAIN_FILE}", str(path))
        mode = stat.S_IMODE(status.st_mode)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(
        os.open(temporary, flags, 0o666 if mode is None else 0o600), "w", encoding="utf-8", newline="\n"
    ) as file:
        try:
            file.write(text)
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and bring their names to disk. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Bring the bytes of a file to disk, whoever has written them. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names of the files of a folder to disk: without it a file that was renamed may be lost with the power.

    Raises:
        OSError: the folder cannot be read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # file systems whose folders know no sync
            raise
    finally:
        os.close(descriptor)
