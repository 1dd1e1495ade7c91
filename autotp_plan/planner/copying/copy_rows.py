"""Copying rows that lie apart in memory: what sharding a tensor inside its rows comes down to.

numpy does it, and transposes matrices, at the speed of memory, whatever the length of a row. Where it is not installed
(planning takes nothing heavy; wherever torch is, numpy is) rows are copied one by one.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple


class Rows(NamedTuple):
    """Rows in memory: the first begins at byte `start`, each further one `stride` bytes after the one before."""

    memory: memoryview
    start: int
    stride: int


def copy_rows(target: Rows, source: Rows, length: int, count: int) -> None:
    """Copy `count` rows of `length` bytes."""
    numpy = _numpy() if count > 1 else None
    if numpy is None:
        for row in range(count):
            start, to = source.start + row * source.stride, target.start + row * target.stride
            target.memory[to : to + length] = source.memory[start : start + length]
        return
    width = math.gcd(8, length, target.start, source.start, target.stride, source.stride)
    to, of = (
        numpy.ndarray((count, length // width), f"u{width}", rows.memory, rows.start, (rows.stride, width))
        for rows in (target, source)
    )
    to[...] = of


def transpose(target: memoryview, source: memoryview, rows: int, columns: int, item: int) -> None:
    """Fill `target` with the transposed matrices of `source`, of `rows` by `columns` elements of `item` bytes each."""
    numpy = _numpy()
    size = rows * columns * item
    if numpy is not None:
        found = numpy.frombuffer(source, f"u{item}").reshape(-1, rows, columns)
        numpy.frombuffer(target, f"u{item}").reshape(-1, columns, rows)[...] = found.transpose(0, 2, 1)
        return
    for start in range(0, len(source), size or 1):
        for row in range(rows):
            of = source[start + row * columns * item : start + (row + 1) * columns * item]
            for byte in range(item):
                target[start + row * item + byte : start + size : rows * item] = of[byte::item]


@functools.cache
def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
