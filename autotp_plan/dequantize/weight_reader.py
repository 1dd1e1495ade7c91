"""Reading a quantised weight: the codes and scales of exactly the rows and columns that are asked for.

Needs numpy, as `dequantize.decode`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from autotp_plan.dequantize.decode import BITS, STORED_AS, Array, decode, scales_of
from autotp_plan.dequantize.quantized_tensor import QuantizedTensor
from autotp_plan.dequantize.rectangles import Rectangle, rectangles
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.storage.files import ByteRange, Reader, Span
from autotp_plan.schemas.storage.safetensors_header import TensorEntry, item_size

_READ_BYTES = 4 * 1024 * 1024
"""Codes that are read at a time: a request, where they lie far away."""

_BESIDE = 8
"""Threads that fetch scales from far away."""


class WeightReader:
    """Reads the weights of one checkpoint; from several threads.

    Args:
        dtype: what the values become: BF16, F16 or F32.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._item = np.dtype(STORED_AS[dtype]).itemsize
        self._scales = _Kept(16)
        self._codes = _Kept(3)
        self._beside = ThreadPoolExecutor(_BESIDE, thread_name_prefix="scales")

    def read_into(self, target: memoryview, tensor: QuantizedTensor, spans: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with the bytes of `spans` of a weight, one after the other. Raises as `StoredFile`."""
        for elements, odd in _grouped(spans, self._item):
            if odd is None:
                size = sum(span.length for span in elements) * self._item
                self._fill(target[:size], tensor, elements, reader)
            else:  # it begins or ends inside of an element
                size = odd.length
                some = memoryview(bytearray(elements[0].length * self._item))
                self._fill(some, tensor, elements, reader)
                target[:size] = some[odd.start : odd.start + size]
            target = target[size:]

    def _fill(self, target: memoryview, tensor: QuantizedTensor, spans: Sequence[Span], reader: Reader) -> None:
        """Fill `target` with elements."""
        values = np.frombuffer(target, STORED_AS[self._dtype])
        height, width = tensor.shape[-2:]
        done = 0
        for found in rectangles(spans, width):
            out = values[done : done + found.size].reshape(found.rows, found.columns)
            done += found.size
            for matrix, top, rows in _per_matrix(found, height):
                part = Rectangle(found.row + top - matrix * height, found.column, rows, found.columns)
                inside = out[top : top + rows]
                if tensor.transposed:
                    part, inside = Rectangle(part.column, part.row, part.columns, part.rows), inside.T
                self._fill_rectangle(inside, tensor, matrix, part, reader)

    def _fill_rectangle(
        self, out: Array, tensor: QuantizedTensor, matrix: int, part: Rectangle, reader: Reader
    ) -> None:
        """Fill `out` with the rows and columns `part` of one matrix of a weight."""
        scales = self._scales_of(tensor, matrix, reader)
        for tile in _tiles(part, tensor, _READ_BYTES * 8 // BITS[tensor.coding]):
            codes = self._codes_of(tensor, matrix, tile, reader)
            first, _ = _bytes_of(tensor, tile)
            inside = out[tile.row - part.row :, tile.column - part.column :]
            for found, top, left in tile.at_blocks(tensor.block):
                _decode_part(
                    inside[top : top + found.rows, left : left + found.columns],
                    codes[top : top + found.rows],
                    first,
                    found,
                    tensor,
                    self._dtype,
                    scales.result(),
                )
            del codes, inside  # before the next are read

    def _codes_of(self, tensor: QuantizedTensor, matrix: int, tile: Rectangle, reader: Reader) -> Array:
        """The codes of some rows and columns, `[rows, bytes]`.

        Rows of the weight are columns of codes that are transposed, a few bytes of each row: then all are read, and
        kept for the rows that follow.
        """
        if not tensor.transposed or tile.columns == tensor.columns:
            return _codes(tensor, matrix, tile, reader)
        everything = Rectangle(0, 0, tensor.rows, tensor.columns)
        key = id(tensor), matrix
        found = self._codes.get(key, lambda: _codes(tensor, matrix, everything, reader)).result()
        start, stop = _bytes_of(tensor, tile)
        return found[tile.row : tile.row + tile.rows, start:stop]

    def _scales_of(self, tensor: QuantizedTensor, matrix: int, reader: Reader) -> Future[Array]:
        """The scales of one matrix, `[block rows, block columns]`. Those far away come while codes are read."""

        def read(reader: Reader) -> Array:
            if tensor.stated_shape is not None:
                _check_shape(tensor, tensor.stated_shape, reader)
            size = item_size(tensor.scale.dtype) * tensor.grid[0] * tensor.grid[1]
            raw = _read(tensor.scale, [Span(matrix * size, size)], size, reader)
            return scales_of(tensor.scale.dtype, raw).reshape(tensor.grid)

        def read_beside() -> Array:
            with reader.another() as another:
                return read(another)

        key = id(tensor), matrix
        if isinstance(tensor.scale.file, Path):
            return self._scales.get(key, lambda: read(reader))
        return self._scales.get(key, read_beside, self._beside)


class _Kept:
    """The last few arrays that were read. A thread that asks for one that another reads waits for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[tuple[int, int], Future[Array]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], read: Callable[[], Array], executor: Executor | None = None) -> Future[Array]:
        """What is kept under `key`, which `read` reads where it is not: at once, or by an executor."""
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
                return found
            found = self._found[key] = Future()
            if len(self._found) > self._most:
                self._found.popitem(last=False)
        if executor is None:
            self._complete(key, found, read)
        else:
            executor.submit(self._complete, key, found, read)
        return found

    def _complete(self, key: tuple[int, int], found: Future[Array], read: Callable[[], Array]) -> None:
        try:
            found.set_result(read())
        except BaseException as error:
            with self._lock:
                self._found.pop(key, None)
            found.set_exception(error)


def _decode_part(
    out: Array, codes: Array, first: int, part: Rectangle, tensor: QuantizedTensor, dtype: str, scales: Array
) -> None:
    """Values of a part that begins with a block or lies in one; `codes` are those of its rows, from byte `first` on."""
    bits = BITS[tensor.coding]
    inside = scales[part.row // tensor.block[0] :, part.column // tensor.block[1] :]
    start, stop = _bytes_of(tensor, part)
    inner = codes[:, start - first : stop - first]
    before = part.column - start * 8 // bits
    if before or (stop - start) * 8 // bits != part.columns:  # half of a byte is not asked for
        wide = np.empty((part.rows, (stop - start) * 8 // bits), STORED_AS[dtype])
        decode(wide, inner, tensor.coding, dtype, inside, tensor.block)
        out[...] = wide[:, before : before + part.columns]
    else:
        decode(out, inner, tensor.coding, dtype, inside, tensor.block)


def _codes(tensor: QuantizedTensor, matrix: int, part: Rectangle, reader: Reader) -> Array:
    """The codes of some rows and columns, `[rows, bytes]`."""
    row_bytes = tensor.row_bytes
    start, stop = _bytes_of(tensor, part)
    first = (matrix * tensor.rows + part.row) * row_bytes
    if stop - start == row_bytes:
        spans = [Span(first, part.rows * row_bytes)]
    else:
        spans = [Span(first + row * row_bytes + start, stop - start) for row in range(part.rows)]
    return _read(tensor.codes, spans, part.rows * (stop - start), reader).reshape(part.rows, stop - start)


def _bytes_of(tensor: QuantizedTensor, part: Rectangle) -> tuple[int, int]:
    """Which bytes of a row of codes the columns of a part are in."""
    bits = BITS[tensor.coding]
    return part.column * bits // 8, -(-(part.column + part.columns) * bits // 8)


def _read(entry: TensorEntry, spans: Sequence[Span], size: int, reader: Reader) -> Array:
    """`size` bytes of a tensor."""
    found = np.empty(size, np.uint8)
    reader.read_into(found.data, [ByteRange(entry.file, entry.start + at, length) for at, length in spans])
    return found


def _tiles(part: Rectangle, tensor: QuantizedTensor, most: int) -> Iterator[Rectangle]:
    """A rectangle, rows of about `most` values at a time: they end with blocks where that can be."""
    most = max(most // part.columns, 1)
    height = tensor.block[0]
    row, last = part.row, part.row + part.rows
    while row < last:
        stop = row + most
        if most >= height:
            stop -= stop % height
        stop = min(stop, last)
        yield Rectangle(row, part.column, stop - row, part.columns)
        row = stop


def _per_matrix(found: Rectangle, height: int) -> Iterator[tuple[int, int, int]]:
    """The matrices of `height` rows that a rectangle reaches into: `(matrix, row of the rectangle, rows)`."""
    top = 0
    while top < found.rows:
        matrix, inside = divmod(found.row + top, height)
        rows = min(height - inside, found.rows - top)
        yield matrix, top, rows
        top += rows


def _grouped(spans: Sequence[Span], item: int) -> Iterator[tuple[list[Span], Span | None]]:
    """Spans of bytes as spans of elements; one that ends inside of an element comes alone.

    Yields:
        Elements, and which bytes of them are meant; None for all.
    """
    even: list[Span] = []
    for span in spans:
        if not (span.start % item or span.length % item):
            even.append(Span(span.start // item, span.length // item))
            continue
        if even:
            yield even, None
            even = []
        first, last = span.start // item, -(-(span.start + span.length) // item)
        yield [Span(first, last - first)], Span(span.start - first * item, span.length)
    if even:
        yield even, None


def _check_shape(tensor: QuantizedTensor, stated: TensorEntry, reader: Reader) -> None:
    """Raise CheckpointError where the checkpoint says that a weight has another shape."""
    raw = _read(stated, [Span(0, stated.stop - stated.start)], stated.stop - stated.start, reader)
    kinds: dict[str, Any] = {"I32": np.int32, "I64": np.int64}
    found = tuple(raw.view(kinds[stated.dtype]).tolist())
    if found != tensor.shape:
        raise CheckpointError(
            Fault(
                code="another-stated-shape",
                what="a quantised weight is said to have another shape than its codes",
                where=stated.name,
                got=str(list(found)),
                expected=str(list(tensor.shape)),
                next="fetch the checkpoint again",
            )
        )
