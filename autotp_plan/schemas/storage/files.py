"""Files, byte ranges of them, and the one way to read them.

A file is a path, or a `StoredFile`: one that lies far away, or whose bytes are computed while they are read.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from autotp_plan.schemas.storage.uncached import UncachedFiles


class Span(NamedTuple):
    """`length` bytes of some file, from byte `start` on."""

    start: int
    length: int


class StoredFile(Protocol):
    """A file that is not in a folder of this machine: it is read from far away, or its bytes are computed."""

    @property
    def name(self) -> str:
        """Its name in its folder."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with the bytes of `spans`, one after the other.

        Args:
            target: as long as the spans are together.
            spans: in any order; those of a tensor's columns are many short ones at equal distances.
            reader: for what it reads itself; it keeps files open, and is used by one thread at a time.

        Raises:
            OSError: it cannot be read.
            EOFError: it ends before.
        """


@runtime_checkable
class DerivedFile(Protocol):
    """A `StoredFile` whose bytes are those of other files in another order, or computed of them."""

    @property
    def behind(self) -> Sequence[File]:
        """The files that it reads."""


@dataclass(frozen=True)
class MadeFile:
    """A file that is nowhere but in memory: `data` (a `StoredFile`)."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def __str__(self) -> str:
        return self.name

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        for start, length in spans:
            target[:length] = self.data[start : start + length]
            target = target[length:]


File = Path | StoredFile


def file_size(file: File) -> int:
    """Bytes. Raises OSError."""
    return file.stat().st_size if isinstance(file, Path) else file.size


def local_files(file: File) -> Iterator[Path]:
    """The files of this machine that a file's bytes come from: none of one far away, or in memory."""
    if isinstance(file, Path):
        yield file
    elif isinstance(file, DerivedFile):
        for one in file.behind:
            yield from local_files(one)


def is_far(file: File) -> bool:
    """Whether bytes of a file are fetched from another machine."""
    if isinstance(file, DerivedFile):
        return any(map(is_far, file.behind))
    return not isinstance(file, (Path, MadeFile))


def local_path(file: File) -> Path:
    """The path of a file that can only be one of this machine's: one that we write."""
    assert isinstance(file, Path), f"{file} is not in a folder of this machine"
    return file


class ByteRange(NamedTuple):
    """`length` bytes of `file`, from byte `start` on."""

    file: File
    start: int
    length: int


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
        self._uncached: UncachedFiles | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def another(self) -> Reader:
        """A reader of the same kind, for another thread."""
        return Reader()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])
        if self._uncached is not None:
            self._uncached.close()

    def read_into(self, target: memoryview, ranges: Iterable[ByteRange], *, once: bool = False) -> None:
        """Fill `target` with the bytes of `ranges`, which are as many.

        Args:
            target: where to.
            ranges: what is read.
            once: nobody else reads the same bytes soon: of a file on this machine, what is not in the page cache is
                read past it.

        Raises:
            OSError: a file cannot be read.
            EOFError: a file ends before.
        """
        for file, group in itertools.groupby(ranges, key=lambda found: found.file):
            spans = [Span(found.start, found.length) for found in group]
            size = sum(span.length for span in spans)
            part, target = target[:size], target[size:]
            if isinstance(file, Path):
                self._read_local(part, file, spans, once)
            else:
                file.read_into(part, spans, self)

    def _read_local(self, target: memoryview, file: Path, spans: Sequence[Span], once: bool) -> None:
        for position, length in spans:
            part, target = target[:length], target[length:]
            start, stop = self._read_uncached(part, file, position) if once else (0, 0)
            self._read_cached(part[:start], file, position)
            self._read_cached(part[stop:], file, position + stop)

    def _read_uncached(self, target: memoryview, file: Path, position: int) -> tuple[int, int]:
        if self._uncached is None:
            from autotp_plan.schemas.storage.uncached import UncachedFiles

            self._uncached = UncachedFiles(self._max_open, self._flags)
        return self._uncached.read_into(target, file, position)

    def _read_cached(self, target: memoryview, file: Path, position: int) -> None:
        descriptor = self._descriptor(file) if target else -1
        while target:
            got = os.preadv(descriptor, [target], position)
            if got == 0:
                raise EOFError(f"{file} ended {len(target)} bytes early; it changed while it was read")
            target, position = target[got:], position + got

    def read_through(
        self, buffer: memoryview, ranges: Iterable[ByteRange], *, once: bool = False
    ) -> Iterator[memoryview]:
        """The bytes of `ranges`, `buffer` by `buffer`; the last may be shorter. The rest is as in `read_into`."""
        for part in in_parts(ranges, len(buffer)):
            filled = buffer[: sum(found.length for found in part)]
            self.read_into(filled, part, once=once)
            yield filled

    def _descriptor(self, file: Path) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            if len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(file, self._flags)
            self._open[file] = descriptor
        self._open.move_to_end(file)
        return descriptor


def in_parts(ranges: Iterable[ByteRange], size: int) -> Iterator[list[ByteRange]]:
    """Byte ranges in parts of `size` bytes; the last may be shorter."""
    part: list[ByteRange] = []
    left = size
    for file, start, length in ranges:
        while length:
            count = min(length, left)
            part.append(ByteRange(file, start, count))
            start, length, left = start + count, length - count, left - count
            if not left:
                yield part
                part, left = [], size
    if part:
        yield part
