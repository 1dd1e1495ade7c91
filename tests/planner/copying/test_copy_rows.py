"""Rows that lie apart in memory are copied to the same places with numpy and without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.planner.copying import copy_rows


@given(
    length=st.integers(1, 20),
    count=st.integers(1, 6),
    gaps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    starts=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_numpy_and_plain_copies_give_the_same_bytes(
    length: int, count: int, gaps: tuple[int, int], starts: tuple[int, int]
) -> None:
    source = bytes(range(256))
    strides = [length + gap for gap in gaps]
    wanted = bytearray(256)
    for row in range(count):
        start, end = starts[0] + row * strides[0], starts[1] + row * strides[1]
        wanted[end : end + length] = source[start : start + length]
    for numpy in (copy_rows._numpy(), None):
        target = bytearray(256)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copy_rows, "_numpy", lambda numpy=numpy: numpy)
            to = copy_rows.Rows(memoryview(target), starts[1], strides[1])
            copy_rows.copy_rows(to, copy_rows.Rows(memoryview(source), starts[0], strides[0]), length, count)
        assert target == wanted
