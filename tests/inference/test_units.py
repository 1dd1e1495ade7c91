"""From bit masks to units and segments: every way in which the rows of fused weights are known to lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.inference.regions.units import Segment, Units, blocks, components, divided, find_units, segments

HEADS, GROUPS, HEAD_DIM = 6, 2, 4  # a head has not as many features as heads share something
SIZE = HEADS * HEAD_DIM


def head(number: int) -> int:
    """The features of one head."""
    return ((1 << HEAD_DIM) - 1) << (number * HEAD_DIM)


def group(number: int) -> int:
    """The features of the heads that share a key-value head."""
    each = HEADS // GROUPS
    return sum(head(one) for one in range(number * each, (number + 1) * each))


Q = [head(row // HEAD_DIM) for row in range(SIZE)]
K = [group(row // HEAD_DIM) for row in range(GROUPS * HEAD_DIM)]
V = [
    sum(1 << (one * HEAD_DIM + offset) for one in range(HEADS) if group(number) & head(one))
    for number in range(GROUPS)
    for offset in range(HEAD_DIM)
]
ONE_V = [1 << row for row in range(SIZE)]
"""Rows of V where each head has its own."""


def test_multi_head_attention_has_heads() -> None:
    units = find_units(SIZE, {"q": Q, "k": Q, "v": ONE_V})
    assert units is not None
    assert units.coarse == units.fine == tuple(head(one) for one in range(HEADS))
    assert segments([*Q, *Q, *ONE_V], units) == (Segment(unit=HEAD_DIM, count=HEADS),) * 3


def test_grouped_heads_are_fine_units_of_coarse_ones() -> None:
    units = find_units(SIZE, {"q": Q, "k": K, "v": V})
    assert units is not None
    assert units.coarse == (group(0), group(1))
    assert len(units.fine) == HEADS
    assert units.num_shared == HEADS // GROUPS
    assert segments(Q, units) == (Segment(unit=HEAD_DIM, count=HEADS, fine=True),)
    assert segments(V, units) == segments(K, units) == (Segment(unit=HEAD_DIM, count=GROUPS),)


def test_fused_rows_of_unequal_parts() -> None:
    fused = [*Q, *K, *V]
    units = find_units(SIZE, {"qkv": fused})
    assert units is not None
    assert segments(fused, units) == (
        Segment(unit=HEAD_DIM, count=HEADS, fine=True),
        Segment(unit=HEAD_DIM, count=GROUPS),
        Segment(unit=HEAD_DIM, count=GROUPS),
    )


def test_rows_interleaved_by_group_keep_the_group_together() -> None:
    half = SIZE // GROUPS
    rows = [
        row
        for number in range(GROUPS)
        for part in (
            Q[number * half : (number + 1) * half],
            K[number * HEAD_DIM :][:HEAD_DIM],
            V[number * HEAD_DIM :][:HEAD_DIM],
        )
        for row in part
    ]
    units = find_units(SIZE, {"qkv": rows})
    assert units is not None
    assert segments(rows, units) == (Segment(unit=half + 2 * HEAD_DIM, count=GROUPS, mixed=True),)


def test_one_key_value_head_is_shared_by_all() -> None:
    every = (1 << SIZE) - 1
    v = [sum(1 << (one * HEAD_DIM + offset) for one in range(HEADS)) for offset in range(HEAD_DIM)]
    rows = [*Q, *[every] * HEAD_DIM, *v]
    units = find_units(SIZE, {"qkv": rows})
    assert units is not None
    assert len(units.coarse) == HEADS
    assert segments(rows, units) == (
        Segment(unit=HEAD_DIM, count=HEADS),
        Segment(unit=2 * HEAD_DIM, shared=True),
    )


def test_gate_and_up_rows_one_after_the_other_or_in_turns() -> None:
    rows = [1 << row for row in range(5)]
    units = find_units(5, {"gate_up": rows * 2})
    assert units is not None
    assert segments(rows * 2, units) == (Segment(unit=1, count=5),) * 2
    assert segments([row for row in rows for _ in "gu"], units) == (Segment(unit=2, count=5),)


def test_four_blocks_of_heads() -> None:
    """CodeGen: each block holds q, v and k of a quarter of the heads."""
    units = Units(size=8, coarse=tuple(1 << one for one in range(8)), fine=tuple(1 << one for one in range(8)))
    rows = [1 << (block * 2 + one) for block in range(4) for _ in "qvk" for one in range(2)]
    found = segments(rows, units)
    assert found is not None
    assert blocks(found, 8) == 4
    assert [(part.first, part.count) for one in found for part in divided(one, 2)] == [
        (first, 2) for first in (0, 2, 4, 6) for _ in "qvk"
    ]
    whole = Segment(unit=3, count=8)
    assert divided(whole, 2) == tuple(Segment(unit=3, first=first, count=2) for first in (0, 2, 4, 6))


def test_what_all_depend_on_has_no_units() -> None:
    every = (1 << 6) - 1
    assert find_units(6, {"q": [every] * 6}) is None
    assert find_units(6, {"q": [0b000111] * 3}) is None, "some features depend on nothing"
    assert find_units(6, {"q": [0b000001, 0b111110]}) is None, "units of different sizes"


def test_rows_in_no_order_are_refused() -> None:
    three = (0b000011, 0b001100, 0b110000)
    units = Units(size=6, coarse=three, fine=three)
    assert segments([0b0011, 0b0111], units) is None, "a row of one unit and half of another"
    assert segments([0b0011, 0], units) is None, "a row of none"


@given(st.lists(st.integers(min_value=1, max_value=2**12 - 1), max_size=8))
def test_components_are_a_partition(masks: list[int]) -> None:
    found = components(12, masks)
    assert sum(found) == 2**12 - 1, "every feature in one"
    for one in found:
        assert not any(one & other for other in found if other != one)
    for mask in masks:
        assert any(mask & one == mask for one in found), "what depends on one index is together"


@pytest.mark.parametrize(("count", "number"), [(8, 1), (4, 2), (2, 4)])
def test_blocks_of_equal_parts(count: int, number: int) -> None:
    parts = tuple(Segment(unit=1, first=first, count=count) for first in range(0, 8, count))
    assert blocks(parts, 8) == number


def test_blocks_of_unequal_parts_are_none() -> None:
    assert blocks((Segment(unit=1, count=3), Segment(unit=1, first=3, count=5)), 8) == 0
