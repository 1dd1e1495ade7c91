"""Copying rows that lie apart in memory: what sharding a tensor inside its rows comes down to.

numpy does it at the speed of memory, whatever the length of a row. Where it is not installed (planning takes nothing
heavy; wherever torch is, numpy is) rows are copied one by one.
"""

from __future__ import annotations

import functools
import math
from typing import Any


def copy_rows(
    target: memoryview,
    target_start: int,
    target_stride: int,
    source: memoryview,
    source_start: int,
    source_stride: int,
    length: int,
    count: int,
) -> None:
    """Copy `count` rows of `length` bytes; from the first on, a row begins every `stride` bytes on either side."""
    numpy = _numpy() if count > 1 else None
    if numpy is None:
        for row in range(count):
            start, to = source_start + row * source_stride, target_start + row * target_stride
            target[to : to + length] = source[start : start + length]
        return
    width = math.gcd(8, length, target_start, source_start, target_stride, source_stride)
    shape, words = (count, length // width), f"u{width}"
    rows = numpy.ndarray(shape, words, buffer=source, offset=source_start, strides=(source_stride, width))
    numpy.ndarray(shape, words, buffer=target, offset=target_start, strides=(target_stride, width))[...] = rows


@functools.cache
def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
