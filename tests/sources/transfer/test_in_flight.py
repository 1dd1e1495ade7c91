"""Spans of a file far away are fetched by few requests, each byte that is asked for once."""

from __future__ import annotations

import threading
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.schemas.storage.files import Span
from autotp_plan.sources.transfer import in_flight
from autotp_plan.sources.transfer.in_flight import fetch_spans, pieces

CONTENT = Random(0).randbytes(5000)


@given(
    spans=st.lists(st.tuples(st.integers(0, 4900), st.integers(0, 100)), max_size=20),
    piece=st.sampled_from([1, 7, 64, 10_000]),
    gap=st.sampled_from([0, 3, 50]),
)
def test_any_spans(spans: list[tuple[int, int]], piece: int, gap: int) -> None:
    wanted = [Span(*span) for span in spans]
    target = bytearray(sum(length for _, length in spans))
    asked: list[tuple[int, int]] = []

    def fetch(start: int, memory: memoryview) -> None:
        asked.append((start, len(memory)))
        memory[:] = CONTENT[start : start + len(memory)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_flight, "PIECE_BYTES", piece)
        patch.setattr(in_flight, "GAP_BYTES", gap)
        fetch_spans(memoryview(target), wanted, fetch)
    assert bytes(target) == b"".join(CONTENT[start : start + length] for start, length in spans)
    assert all(length <= piece for _, length in asked)
    if gap == 0:
        assert sum(length for _, length in asked) == len(target)


def test_the_columns_of_a_matrix_are_one_block_and_far_tensors_are_not() -> None:
    columns = [Span(row * 4096, 1024) for row in range(1000)]
    found = list(pieces(memoryview(bytearray(1024 * 1000)), columns))
    assert [(piece.start, piece.length) for piece in found] == [(0, 999 * 4096 + 1024)]
    far = [Span(0, 100), Span(10_000_000, 100)]
    assert [piece.length for piece in pieces(memoryview(bytearray(200)), far)] == [100, 100]


def test_what_fails_first_is_raised_once_all_have_ended() -> None:
    running, memory = threading.Barrier(3), memoryview(bytearray(3 * in_flight.PIECE_BYTES))
    ended = []

    def fetch(start: int, target: memoryview) -> None:
        running.wait(10)
        if start == in_flight.PIECE_BYTES:
            raise OSError("broken")
        ended.append(start)

    with pytest.raises(OSError, match="broken"):
        fetch_spans(memory, [Span(0, len(memory))], fetch)
    assert sorted(ended) == [0, 2 * in_flight.PIECE_BYTES]
