"""Byte ranges of files, and the one way to read them.

The bytes of a parameter on disk are those of one tensor, or of several one after the other, in one file or in several:
stacking tensors along a new dimension 0, and concatenating them along dimension 0, puts their bytes one after the
other. Nothing here knows layouts or ranks.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from autotp_plan.schemas.storage.safetensors_header import TensorEntry

_CHUNK_BYTES = 4 * 1024 * 1024


class ByteRange(NamedTuple):
    """`length` bytes of `file`, from byte `start` on."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class ByteRanges:
    """Byte ranges one after the other, as one string of bytes."""

    ranges: tuple[ByteRange, ...]

    @classmethod
    def of(cls, tensors: Sequence[TensorEntry]) -> ByteRanges:
        """The bytes of tensors one after the other. Those that touch in a file are one range."""
        joined: list[ByteRange] = []
        for tensor in tensors:
            found = ByteRange(tensor.file, tensor.start, tensor.stop - tensor.start)
            if joined and joined[-1].file == found.file and joined[-1].start + joined[-1].length == found.start:
                found = ByteRange(found.file, joined[-1].start, joined.pop().length + found.length)
            joined.append(found)
        return cls(tuple(joined))

    @classmethod
    def of_file(cls, path: Path, size: int) -> ByteRanges:
        """The bytes of a file of `size` bytes."""
        return cls((ByteRange(path, 0, size),))

    @functools.cached_property
    def size(self) -> int:
        """Bytes in all."""
        return sum(found.length for found in self.ranges)

    def slice(self, start: int, length: int) -> Iterator[ByteRange]:
        """The byte ranges of `length` bytes from byte `start` of the string on, in order."""
        index = bisect.bisect_right(self._ends, start)
        while length > 0:
            file, begin, size = self.ranges[index]
            offset = start - (self._ends[index] - size)
            count = min(length, size - offset)
            if count > 0:
                yield ByteRange(file, begin + offset, count)
            start, length, index = start + count, length - count, index + 1

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(found.length for found in self.ranges))


class Reader:
    """Reads byte ranges, and keeps open the files that it read last. For one thread.

    Args:
        max_open: files to keep open.
        follow_links: whether a file may be a symbolic link.
    """

    def __init__(self, *, max_open: int = 1, follow_links: bool = True) -> None:
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW | os.O_NONBLOCK)
        self._max_open = max_open
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read_into(self, target: memoryview, ranges: Iterable[ByteRange]) -> None:
        """Fill `target` with the bytes of `ranges`, which are as many.

        Raises:
            OSError: a file cannot be read.
            EOFError: a file ends before.
        """
        for file, position, length in ranges:
            left, target = target[:length], target[length:]
            descriptor = self._descriptor(file)
            while left:
                got = os.preadv(descriptor, [left], position)
                if got == 0:
                    raise EOFError(f"{file} ended {len(left)} bytes early; it changed while it was read")
                left, position = left[got:], position + got

    def read_through(self, buffer: memoryview, ranges: Iterable[ByteRange]) -> Iterator[memoryview]:
        """The bytes of `ranges`, `buffer` by `buffer`; the last may be shorter. Raises as `read_into`."""
        filled = 0
        for file, position, length in ranges:
            while length:
                count = min(length, len(buffer) - filled)
                self.read_into(buffer[filled : filled + count], (ByteRange(file, position, count),))
                filled, position, length = filled + count, position + count, length - count
                if filled == len(buffer):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def _descriptor(self, file: Path) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            if len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(file, self._flags)
            self._open[file] = descriptor
        self._open.move_to_end(file)
        return descriptor


def same_bytes(first: ByteRanges, second: ByteRanges) -> bool:
    """Whether two strings of bytes are equal; they are read up to the first difference, a chunk at a time.

    Raises:
        OSError: a file cannot be read.
        EOFError: a file ends before.
    """
    if first.size != second.size:
        return False
    buffers = memoryview(bytearray(_CHUNK_BYTES)), memoryview(bytearray(_CHUNK_BYTES))
    with Reader() as one, Reader() as other:
        pairs = zip(one.read_through(buffers[0], first.ranges), other.read_through(buffers[1], second.ranges))
        return all(left == right for left, right in pairs)
