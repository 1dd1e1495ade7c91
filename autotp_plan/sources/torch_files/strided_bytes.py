"""The bytes of a tensor that lies in a storage with gaps, or turned around: in the order of its elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements of a tensor lie one after the other in the order of their indices."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride)):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def copy_strided(
    target: memoryview, storage: memoryview, item: int, shape: Sequence[int], stride: Sequence[int], start: int
) -> None:
    """Fill `target` with the bytes of a tensor from byte `start` on.

    Args:
        target: bytes; as many as are wanted.
        storage: bytes; it begins with the tensor's first element.
        item: bytes of an element.
        shape: of the tensor.
        stride: elements of the storage from one index to the next, in each dimension.
        start: a byte of the tensor, its elements one after the other.
    """
    first, last = start // item, -(-(start + len(target)) // item)
    if (last - first) * item != len(target):  # it begins or ends within an element
        elements = memoryview(bytearray((last - first) * item))
        copy_strided(elements, storage, item, shape, stride, first * item)
        target[:] = elements[start - first * item :][: len(target)]
        return
    kept = [(size, step) for size, step in zip(shape, stride) if size != 1] or [(1, 1)]
    *outer, (columns, step) = kept
    kind = _FORMATS[item]
    to = target.cast("B").cast(kind)
    source = storage[: len(storage) // item * item].cast("B").cast(kind)
    at = first
    while at < last:
        row, column = divmod(at, columns)
        count = min(columns - column, last - at)
        begin = column * step
        for size, distance in reversed(outer):
            row, index = divmod(row, size)
            begin += index * distance
        if step:
            to[at - first : at - first + count] = source[begin : begin + (count - 1) * step + 1 : step]
        else:
            to[at - first : at - first + count] = memoryview(source[begin : begin + 1].tobytes() * count).cast(kind)
        at += count
