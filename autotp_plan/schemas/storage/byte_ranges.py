"""The bytes of a parameter on disk, as one string.

They are those of one tensor, or of several one after the other, in one file or in several: stacking tensors along a new
dimension 0, and concatenating them along dimension 0, puts their bytes one after the other. Nothing here knows layouts
or ranks.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autotp_plan.schemas.storage.files import ByteRange, File, Reader
from autotp_plan.schemas.storage.safetensors_header import TensorEntry

_CHUNK_BYTES = 4 * 1024 * 1024


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
    def of_file(cls, path: File, size: int) -> ByteRanges:
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
