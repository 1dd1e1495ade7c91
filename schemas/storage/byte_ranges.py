"""The bytes of a parameter on disk: those of one tensor, or of several one after the other, in one file or in several.

Stacking tensors along a new dimension 0, and concatenating them along dimension 0, puts their bytes one after the
other; so whatever a parameter is made of, it is read as one string of bytes. Nothing here knows layouts or ranks.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from autotp_plan.schemas.storage.safetensors_header import TensorEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """A string of bytes of elements of one dtype.

    Bytes `[begins[i], begins[i + 1])` of it, the last up to `size`, are those of `files[i]` from `positions[i]` on.
    """

    name: str
    dtype: str
    size: int
    begins: tuple[int, ...]
    files: tuple[Path, ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, name: str, entries: Sequence[TensorEntry]) -> Segments:
        """The bytes of one or more tensors, joined where they touch in a file."""
        begins: list[int] = []
        files: list[Path] = []
        positions: list[int] = []
        size, end = 0, -1
        for entry in entries:
            if not files or entry.file != files[-1] or entry.start != end:
                begins.append(size)
                files.append(entry.file)
                positions.append(entry.start)
            size, end = size + entry.stop - entry.start, entry.stop
        return cls(
            name=name,
            dtype=entries[0].dtype,
            size=size,
            begins=tuple(begins),
            files=tuple(files),
            positions=tuple(positions),
        )

    def ranges(self, offset: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """The `(file, position, length)` byte ranges that hold `count` bytes from `offset` on, in order."""
        index = bisect.bisect_right(self.begins, offset) - 1
        while count > 0:
            end = self.begins[index + 1] if index + 1 < len(self.begins) else self.size
            length = min(count, end - offset)
            if length > 0:
                yield self.files[index], self.positions[index] + offset - self.begins[index], length
            offset, count, index = offset + length, count - length, index + 1


class SegmentReader:
    """Reads segments as if they were one file. Holds one file open at a time; not for several threads."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self._file: Path | None = None
        self._descriptor = -1

    def __enter__(self) -> SegmentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file = None
            os.close(self._descriptor)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on. Raises OSError, or EOFError when a file ends before."""
        filled = 0
        for file, position, length in self.segments.ranges(offset, len(target)):
            if file != self._file:
                self.close()
                self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                self._file = file
            end = filled + length
            while filled < end:
                got = os.preadv(self._descriptor, [target[filled:end]], position)
                if got == 0:
                    raise EOFError(f"{file} ended {end - filled} bytes early; it changed while it was read")
                filled, position = filled + got, position + got
