"""Copying rows that lie apart in memory: what cutting a tensor inside its rows comes down to.

numpy does it at the speed of memory, whatever the length of a row. Where it is not installed (planning takes nothing
heavy; wherever torch is, numpy is) rows are copied one by one.
"""

from __future__ import annotations

import functools
import math
from typing import Any


def copy_rows(
    target: memoryview,
    target_at: int,
    target_stride: int,
    source: memoryview,
    source_at: int,
    source_stride: int,
    length: int,
    count: int,
) -> None:
    """Copy `count` rows of `length` bytes, which begin every so many bytes on either side."""
    numpy = _numpy() if count > 1 else None
    if numpy is None:
        for _ in range(count):
            target[target_at : target_at + length] = source[source_at : source_at + length]
            target_at, source_at = target_at + target_stride, source_at + source_stride
        return
    width = math.gcd(8, length, target_at, source_at, target_stride, source_stride)
    shape, words = (count, length // width), f"u{width}"
    rows = numpy.ndarray(shape, words, buffer=source, offset=source_at, strides=(source_stride, width))
    numpy.ndarray(shape, words, buffer=target, offset=target_at, strides=(target_stride, width))[...] = rows


@functools.cache
def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
