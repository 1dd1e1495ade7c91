"""A file that is written in any order, by several threads and processes, and gets its name only when it is complete."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.files import ByteRange, Reader

FOR_ALL = 0o666
COPY_BYTES = 16 * 1024 * 1024
MAX_NAME_BYTES = 200
"""A longer name, with what is added to it while the file is written, is one that file systems refuse (255 bytes)."""


def short_name(name: str) -> str:
    """A name to which more can be added: of a very long one its hash."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= MAX_NAME_BYTES else hashlib.sha256(encoded).hexdigest()


def temporary_path(path: Path) -> Path:
    """The name of a file while it is written."""
    return path.parent / f".{short_name(path.name)}.tmp"


class OutputFile:
    """A file that is being written under a temporary name.

    Args:
        path: the name that it will have.
        size: its bytes.
        header: what it begins with; written when it is created.
        mode: who may read and write it, as far as the umask lets them.

    Attributes:
        blocks: the checksums of what was written.
        temporary: the name that it has until it is complete.
    """

    def __init__(self, path: Path, size: int, header: bytes = b"", mode: int = FOR_ALL) -> None:
        self.path, self.size, self.header, self.mode = path, size, header, mode
        self.temporary = temporary_path(path)
        self.blocks: list[checksum.Block] = []
        self._descriptor = -1
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The name in its folder."""
        return self.path.name

    def create(self) -> None:
        """Make the file, with its header, as large as it will be, and open it. Raises OSError, as all here do."""
        self.open(os.O_CREAT | os.O_TRUNC)
        self.write(memoryview(self.header), 0)
        os.truncate(self._descriptor, self.size)

    def open(self, flags: int = 0) -> None:
        """Open a file that this or another process has created."""
        self.close()
        flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.temporary, flags, self.mode)

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes from byte `position` on, and note their checksum."""
        if not data:
            return
        block = checksum.Block(position, len(data), checksum.of_bytes(data))
        at = position
        while data:
            written = os.pwritev(self._descriptor, [data], at)
            if written == 0:
                raise OSError(errno.EIO, "the file system takes no more bytes and says no reason", str(self.path))
            data, at = data[written:], at + written
        if hasattr(os, "posix_fadvise"):  # Linux begins to write it to disk, so that the sync at the end finds little
            os.posix_fadvise(self._descriptor, position, block.length, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self.blocks.append(block)

    def copy(self, ranges: Iterable[ByteRange], position: int) -> None:
        """Write the bytes of other files from byte `position` on. Raises EOFError when one ends before."""
        with Reader() as reader:
            for data in reader.read_through(memoryview(bytearray(COPY_BYTES)), ranges):
                self.write(data, position)
                position += len(data)

    def sync(self) -> None:
        """Bring what was written to disk."""
        os.fsync(self._descriptor)

    def crc32(self) -> int:
        """The checksum of the file. All of it must have been written."""
        return checksum.of_blocks(self.blocks, self.size)

    def take_name(self) -> None:
        """Give the file its final name."""
        self.temporary.replace(self.path)

    def remove(self) -> None:
        """Close the file, and remove it where it has not got its final name."""
        self.close()
        self.temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, where it is open."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
