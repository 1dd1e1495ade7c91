"""The bytes of a file of a checkpoint in their order, from the shards that hold its tensors.

Of a safetensors file they are its header and its tensors. A `.bin` file is a zip file: what lies between its tensors is
read from the file itself, and two tensors may have the same bytes, or have them in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from autotp_plan.planner.copying.copy_engine import CHUNK_BYTES, ChunkReader
from autotp_plan.planner.copying.copy_plan import TensorCopy
from autotp_plan.schemas.storage.files import ByteRange, File, Reader, file_size
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, prefixed
from autotp_plan.sources.torch_files.strided_bytes import copy_strided
from autotp_plan.sources.torch_files.torch_view import Piece, TorchFile

SMALL_BYTES = 64 * 1024
"""Gaps of a `.bin` file that are read together, before all else: far away each is a request."""
SMALL_IN_ALL = 16 * 1024 * 1024


class SourceChanged(Exception):
    """Bytes that were read twice, and differ."""


class Placed:
    """Where a tensor of the checkpoint lies in the shards: in a parameter that is stored so, from byte `offset` on."""

    __slots__ = ("copy", "names", "offset")

    def __init__(self, copy: TensorCopy, offset: int) -> None:
        self.copy, self.offset = copy, offset
        self.names = {Path(str(part.file)).name for shard in copy.sources for part in shard.ranges.ranges}

    def read(self, reader: ChunkReader, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `[start, stop)` of the tensor as they lie in the checkpoint; each until the next are read."""
        copy, first = self.copy, self.offset + start
        for begin, end in copy._replace(size=stop - start).chunks(CHUNK_BYTES):
            yield reader.read(copy, first + begin, first + end)


def bytes_in_order(
    described: SafetensorsFile | None, parts: Sequence[Placed], reader: ChunkReader
) -> Iterator[memoryview | bytes]:
    """The bytes of a file, each until the next are asked for.

    Args:
        described: the file; None for one that is in `parts` as it is.
        parts: where its tensors lie, in the order of `described`.
        reader: reads the shards.

    Raises:
        SourceChanged: of a `.bin` file, bytes that several tensors have are not the same in all of them.
        OSError: a file cannot be read.
        EOFError: a file ends before.
    """
    if described is None:
        yield from parts[0].read(reader, 0, parts[0].copy.size)
    elif isinstance(described.path, TorchFile):
        placed = {tensor.start: part for tensor, part in zip(described.tensors, parts) if tensor.stop > tensor.start}
        yield from _of_torch_file(described.path, placed, reader)
    else:
        yield prefixed(described.header.encode())
        for tensor, part in zip(described.tensors, parts):
            yield from part.read(reader, 0, tensor.stop - tensor.start)


class _Stretch(NamedTuple):
    """Bytes `[start, stop)` of a file: those of a tensor, or what lies between them."""

    start: int
    stop: int
    piece: Piece | None


def _of_torch_file(file: TorchFile, placed: Mapping[int, Placed], reader: ChunkReader) -> Iterator[memoryview | bytes]:
    stretches, others = _stretches(file.pieces, file_size(file.file))
    repeated = [_Repeated(piece, placed[piece.start]) for piece in others]
    small = _small_gaps(file.file, stretches)
    with Reader() as raw:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for start, stop, piece in stretches:
            if piece is not None:
                blocks = placed[piece.start].read(reader, 0, stop - start)
            elif start in small:
                blocks = iter((small[start],))
            else:
                blocks = raw.read_through(buffer, (ByteRange(file.file, start, stop - start),))
            for data in blocks:
                for one in repeated:
                    one.compare(start, data)
                yield data
                start += len(data)


def _stretches(pieces: Sequence[Piece], size: int) -> tuple[list[_Stretch], list[Piece]]:
    """A file of `size` bytes; and the tensors that are not in it: others have their bytes, or in another order."""
    found: list[_Stretch] = []
    others: list[Piece] = []
    reached = 0
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        if not piece.plain or piece.begin < reached:
            others.append(piece)
            continue
        if piece.begin > reached:
            found.append(_Stretch(reached, piece.begin, None))
        reached = piece.begin + piece.stop - piece.start
        found.append(_Stretch(piece.begin, reached, piece))
    if reached < size:
        found.append(_Stretch(reached, size, None))
    return found, others


def _small_gaps(file: File, stretches: Sequence[_Stretch]) -> dict[int, memoryview]:
    """What lies between tensors, where it is little: by its first byte."""
    gaps: list[ByteRange] = []
    left = SMALL_IN_ALL
    for start, stop, piece in stretches:
        if piece is None and stop - start <= min(SMALL_BYTES, left):
            gaps.append(ByteRange(file, start, stop - start))
            left -= stop - start
    memory = memoryview(bytearray(SMALL_IN_ALL - left))
    with Reader() as raw:
        raw.read_into(memory, gaps)
    found = {}
    for _, start, length in gaps:
        found[start], memory = memory[:length], memory[length:]
    return found


class _Repeated:
    """A tensor whose bytes are those of others, or in another order: they must be what passes."""

    def __init__(self, piece: Piece, placed: Placed) -> None:
        self._piece, self._placed = piece, placed
        self._storage = bytearray() if piece.plain else bytearray(piece.length)

    def compare(self, start: int, data: memoryview) -> None:
        """Compare what is its in `data`, which is at byte `start` of the file. Raises SourceChanged."""
        begin, end = self._piece.begin, self._piece.begin + self._piece.length
        first, last = max(start, begin), min(start + len(data), end)
        if first >= last:
            return
        passing = data[first - start : last - start]
        if self._piece.plain:
            self._compare(first - begin, passing)
            return
        self._storage[first - begin : last - begin] = passing
        if last == end:
            size = self._piece.stop - self._piece.start
            for at in range(0, size, CHUNK_BYTES):
                part = memoryview(bytearray(min(CHUNK_BYTES, size - at)))
                piece = self._piece
                copy_strided(part, memoryview(self._storage), piece.item, piece.shape, piece.stride, at)
                self._compare(at, part)
            self._storage = bytearray()

    def _compare(self, start: int, data: memoryview) -> None:
        reader = ChunkReader(CHUNK_BYTES)
        try:
            for found in self._placed.read(reader, start, start + len(data)):
                if found != data[: len(found)]:
                    raise SourceChanged("a tensor that is not what lies in the file where it was read")
                data = data[len(found) :]
        finally:
            reader.close()
