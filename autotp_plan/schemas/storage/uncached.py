"""Reading large parts of files that are not in the page cache straight into memory, past the cache (`O_DIRECT`).

Through the cache, the kernel takes new memory for every page, fills it, and copies it once more. Where bytes are needed
once, by one process, that is lost time, and it drives out what other programs have cached. What is in the cache already
is read from there. Where a file system cannot do this, or does not say what is cached, files are read as always.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4096
"""Positions in file and memory must be multiples of what the disk asks for: of nearly all disks at most this."""
LEAST_BYTES = 1024 * 1024
BUFFER_BYTES = 4 * 1024 * 1024
HUGE_PAGE_BYTES = 2 * 1024 * 1024
SAMPLES = 8
"""Pages of a part of a file that the kernel is asked about: where it has most of them, it has most of the others."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_MAP_FAILED = ctypes.c_void_p(-1).value


def huge_pages(size: int, offset: int = 0) -> memoryview:
    """`size` bytes of new memory in huge pages, where the kernel has them; the first is byte `offset` of one."""
    pages = mmap.mmap(-1, offset + size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    start = offset + -address(memoryview(pages)) % HUGE_PAGE_BYTES  # before it nothing is written: that is no memory
    return memoryview(pages)[start : start + size]


def address(memory: memoryview) -> int:
    """Where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _OpenFile:
    """A file that can be read past the cache, and what the kernel says about its pages."""

    def __init__(self, file: Path, flags: int) -> None:
        self.descriptor = os.open(file, flags | _O_DIRECT)
        self._size = os.fstat(self.descriptor).st_size
        self._mapped: int | None = None

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)
        if self._mapped is not None:
            _libc().munmap(self._mapped, self._size)

    def is_cached(self, position: int, size: int) -> bool:
        """Whether most of `size` bytes from byte `position` on are in the page cache; true too where nobody says."""
        libc = _libc()
        if libc is None or position + size > self._size:
            return True
        if self._mapped is None:  # all of it, once: mapping and unmapping stops other threads that ask for memory
            self._mapped = libc.mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, self.descriptor, 0)
        if self._mapped == _MAP_FAILED:
            self._mapped = None
            return True
        found, cached = ctypes.create_string_buffer(1), 0
        for sample in range(SAMPLES):
            page = (position + size * sample // SAMPLES) // mmap.PAGESIZE * mmap.PAGESIZE
            cached += bool(libc.mincore(self._mapped + page, 1, found)) or found.raw[0] & 1
        return cached > SAMPLES // 2


class UncachedFiles:
    """Files that are read past the cache, and the buffer that bytes go through. For one thread.

    Args:
        max_open: files to keep open.
        flags: what they are opened with.
    """

    def __init__(self, max_open: int, flags: int) -> None:
        self._max_open, self._flags = max_open, flags
        self._open: OrderedDict[Path, _OpenFile | None] = OrderedDict()
        self._buffer: memoryview | None = None

    def close(self) -> None:
        """Close all files."""
        while self._open:
            _close(self._open.popitem()[1])

    def read_into(self, target: memoryview, file: Path, position: int) -> tuple[int, int]:
        """Fill `target` with the bytes of a file from byte `position` on, or some of it.

        Returns:
            what of `target` was filled, `(start, stop)`: nothing where it is short or cached, or where this cannot be
            done; its blocks, where they can be read straight into it; and nothing behind the end of the file.

        Raises:
            OSError: the file cannot be read.
        """
        if len(target) < LEAST_BYTES:
            return 0, 0
        opened = self._opened(file)
        if opened is None or opened.is_cached(position, len(target)):
            return 0, 0
        try:
            if (address(target) - position) % BLOCK_BYTES:
                return 0, self._read_through_buffer(target, opened.descriptor, position)
            return _read_blocks(target, opened.descriptor, position)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            opened.close()  # its file system opens it so, and does not read it so
            self._open[file] = None
            return 0, 0

    def _read_through_buffer(self, target: memoryview, descriptor: int, position: int) -> int:
        if self._buffer is None:
            self._buffer = huge_pages(BUFFER_BYTES)
        done = 0
        while done < len(target):
            before = (position + done) % BLOCK_BYTES
            size = min(BUFFER_BYTES, -(-(before + len(target) - done) // BLOCK_BYTES) * BLOCK_BYTES)
            count = os.preadv(descriptor, [self._buffer[:size]], position + done - before)
            found = self._buffer[before:count][: len(target) - done]
            if not found:
                break
            target[done : done + len(found)] = found
            done += len(found)
        return done

    def _opened(self, file: Path) -> _OpenFile | None:
        """The file, open; None where it cannot be read past the cache."""
        if file not in self._open:
            if len(self._open) >= self._max_open:
                _close(self._open.popitem(last=False)[1])
            try:
                self._open[file] = _OpenFile(file, self._flags) if _O_DIRECT else None
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._open[file] = None
        self._open.move_to_end(file)
        return self._open[file]


def _read_blocks(target: memoryview, descriptor: int, position: int) -> tuple[int, int]:
    """Read all blocks that lie in `target` straight into it."""
    start = done = -position % BLOCK_BYTES
    stop = start + (len(target) - start) // BLOCK_BYTES * BLOCK_BYTES
    while done < stop:
        count = os.preadv(descriptor, [target[done:stop]], position + done)
        done += count
        if count == 0 or count % BLOCK_BYTES:  # the end of the file
            break
    return start, done


def _close(opened: _OpenFile | None) -> None:
    if opened is not None:
        opened.close()


@functools.cache
def _libc() -> Any:
    """The C library with the functions that say what is cached; None on systems that have none of this name."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_longlong]
        libc.mmap.restype = ctypes.c_void_p
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    except (OSError, AttributeError, TypeError):
        return None
    return libc
