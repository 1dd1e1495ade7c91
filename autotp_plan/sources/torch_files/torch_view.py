"""The tensors of a file of `torch.save` as those of a safetensors file that is not there."""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.schemas.storage.files import ByteRange, File, Reader, Span
from autotp_plan.sources.torch_files.strided_bytes import copy_strided


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor: bytes `[start, stop)` of the view. It begins at byte `begin` of the file; the same bytes if `plain`."""

    start: int
    stop: int
    begin: int
    item: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plain: bool

    @property
    def length(self) -> int:
        """Bytes of the storage from its first element to its last."""
        return self.item * (1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride)))


@dataclass(frozen=True, eq=False)
class TorchFile:
    """A safetensors file that is not there: `header`, then the tensors of `file` (a `StoredFile`)."""

    name: str
    file: File
    header: bytes
    size: int
    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.file)

    @property
    def behind(self) -> tuple[File]:
        """The file of `torch.save`."""
        return (self.file,)

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with the bytes of `spans`. Raises OSError, EOFError."""
        waiting: list[ByteRange] = []
        begin = done = 0
        for start, length in spans:
            stop = start + length
            if start < len(self.header):
                part = self.header[start:stop]
                reader.read_into(target[begin:done], waiting)
                target[done : done + len(part)] = part
                begin = done = done + len(part)
                start, waiting = start + len(part), []
            index = bisect.bisect_right(self.starts, start) - 1
            while start < stop:
                piece = self.pieces[index]
                count = min(piece.stop, stop) - start
                if piece.plain:
                    waiting.append(ByteRange(self.file, piece.begin + start - piece.start, count))
                    done += count
                else:
                    reader.read_into(target[begin:done], waiting)
                    self._read_strided(target[done : done + count], piece, start - piece.start, reader)
                    begin = done = done + count
                    waiting = []
                start, index = start + count, index + 1
        reader.read_into(target[begin:done], waiting)

    def _read_strided(self, target: memoryview, piece: Piece, start: int, reader: Reader) -> None:
        length = piece.length
        if not isinstance(self.file, Path):
            storage = memoryview(bytearray(length))
            reader.read_into(storage, [ByteRange(self.file, piece.begin, length)])
            copy_strided(target, storage, piece.item, piece.shape, piece.stride, start)
            return
        before = piece.begin % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size < piece.begin + length:
                raise EOFError(f"{self.file} ended early; it changed while it was read")
            pages = mmap.mmap(opened.fileno(), before + length, access=mmap.ACCESS_READ, offset=piece.begin - before)
        with pages, memoryview(pages) as memory, memory[before:] as storage:
            copy_strided(target, storage, piece.item, piece.shape, piece.stride, start)
