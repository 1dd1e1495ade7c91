"""Transposing matrices as bytes, with numpy and without, and in which chunks a tensor of them is copied."""

from __future__ import annotations

import pytest

from autotp_plan.planner.copying import copy_rows
from autotp_plan.planner.copying.copy_plan import Matrices, TensorCopy
from autotp_plan.planner.copying.copy_rows import transpose


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize("numpy", [True, False])
def test_every_matrix_is_transposed(monkeypatch: pytest.MonkeyPatch, item: int, numpy: bool) -> None:
    if not numpy:
        monkeypatch.setattr(copy_rows, "_numpy", lambda: None)
    count, rows, columns = 3, 2, 5
    elements = [bytes([n, *[n ^ 255] * (item - 1)]) for n in range(count * rows * columns)]
    target = memoryview(bytearray(len(elements) * item))
    transpose(target, memoryview(b"".join(elements)), rows, columns, item)
    wanted = [elements[(m * rows + row) * columns + column]
              for m in range(count) for column in range(columns) for row in range(rows)]  # fmt: skip
    assert bytes(target) == b"".join(wanted)


def test_chunks_hold_whole_matrices() -> None:
    matrices = Matrices(rows=3, columns=4, item=2)
    copy = TensorCopy(24 * 5, (), (), matrices)
    assert list(copy.chunks(60)) == [(0, 48), (48, 96), (96, 120)]
    assert list(copy.chunks(10)) == [(start, start + 24) for start in range(0, 120, 24)]
    assert matrices.transposed() == Matrices(rows=4, columns=3, item=2)
    assert list(TensorCopy(0, (), (), Matrices(0, 4, 2)).chunks(10)) == []
