"""Interval arithmetic: tiling, rejoining, resharding, and the faults of what is no layout."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.schemas import intervals as iv

Parts = list[list[tuple[int, int]]]


@st.composite
def tilings(draw: st.DrawFn, size: int | None = None) -> tuple[int, Parts]:
    """A dimension and a random layout of it: intervals dealt to ranks, some of them to several."""
    size = draw(st.integers(1, 60)) if size is None else size
    inner = sorted(draw(st.sets(st.integers(1, max(1, size - 1)), max_size=8)) - {size})
    edges = [0, *inner, size]
    num_ranks = draw(st.integers(1, 5))
    ranks: Parts = [[] for _ in range(num_ranks)]
    for interval in zip(edges, edges[1:]):
        for rank in draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)):
            ranks[rank].append(interval)
    return size, [draw(st.permutations(rank)) for rank in ranks]


def take(values: list[int], intervals: list[tuple[int, int]] | iv.Intervals) -> list[int]:
    """What a rank holds, index by index."""
    return [value for start, stop in intervals for value in values[start:stop]]


@given(st.integers(0, 200), st.integers(1, 17))
def test_divide_tiles_evenly(count: int, num_ranks: int) -> None:
    divided = iv.divide(count, num_ranks)
    assert [index for start, stop in divided for index in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in divided]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the first ranks hold the longer intervals"


@given(tilings())
def test_join_touching_keeps_the_indices_and_their_order(tiling: tuple[int, Parts]) -> None:
    size, ranks = tiling
    for intervals in ranks:
        joined = iv.join_touching([(0, 0), *intervals, (size, size)])
        assert take(list(range(size)), joined) == take(list(range(size)), intervals)
        assert all(stop != start for (_, stop), (start, _) in zip(joined, joined[1:]))
        assert iv.length(joined) == iv.length(intervals)


@given(tilings())
def test_a_layout_has_no_faults(tiling: tuple[int, Parts]) -> None:
    size, ranks = tiling
    assert iv.faults(ranks, size) == []


@given(tilings(), st.data())
def test_faults_agree_with_counting(tiling: tuple[int, Parts], data: st.DataObject) -> None:
    """Damage a layout somewhere, and compare with counting every index by itself."""
    size, ranks = tiling
    rank = data.draw(st.integers(0, len(ranks) - 1))
    new = data.draw(st.lists(st.tuples(st.integers(-2, size + 2), st.integers(-2, size + 2)), max_size=3))
    ranks[rank] = data.draw(st.sampled_from([new, [*ranks[rank], *new], ranks[rank][1:]]))
    inside = all(0 <= start < stop <= size for intervals in ranks for start, stop in intervals)
    held = [[index for start, stop in intervals for index in range(start, stop)] for intervals in ranks]
    once = all(len(set(one)) == len(one) for one in held)
    covered = set().union(*held) >= set(range(size))
    assert (iv.faults(ranks, size) == []) == (inside and once and covered)


@pytest.mark.parametrize(
    ("ranks", "size", "message"),
    [
        ([[(0, 4)], [(4, 9)]], 8, "rank 1 holds [4, 9), which is not inside [0, 8)"),
        ([[(0, 4)], [(5, 8)]], 8, "no rank holds [4, 5)"),
        ([[(0, 4)], [(4, 7)]], 8, "no rank holds [7, 8)"),
        ([[(0, 4), (2, 8)], [(4, 8)]], 8, "rank 0 holds index 2 twice"),
        ([[(4, 4)], [(0, 8)]], 8, "rank 0 holds [4, 4), which is not inside [0, 8)"),
        ([[], []], 3, "no rank holds [0, 3)"),
    ],
)
def test_faults_say_what_is_wrong(ranks: Parts, size: int, message: str) -> None:
    assert iv.faults(ranks, size) == [message]


@given(tilings())
def test_holders_says_who_holds_each_index(tiling: tuple[int, Parts]) -> None:
    size, ranks = tiling
    found = iv.holders(ranks)
    assert [index for (start, stop), _ in found for index in range(start, stop)] == list(range(size))
    for (start, stop), holding in found:
        for index in range(start, stop):
            by_hand = tuple(r for r, parts in enumerate(ranks) if any(a <= index < b for a, b in parts))
            assert holding == by_hand
    assert all(one[1] != other[1] for one, other in zip(found, found[1:])), "intervals are the longest"
    assert iv.most_holders(ranks) == max(len(holding) for _, holding in found)


def test_holders_of_the_most_ranks_that_a_plan_may_have() -> None:
    ranks = [[one] for one in iv.divide(65_537, 65_536)]
    started = time.process_time()
    found = iv.holders(ranks)
    assert time.process_time() - started < 5
    assert found == [(interval, (rank,)) for rank, (interval,) in enumerate(ranks)]


@given(st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4), max_size=4))
def test_holders_of_intervals_that_are_no_layout(ranks: list[list[tuple[int, int]]]) -> None:
    held = [[(min(one), max(one)) for one in rank] for rank in ranks]
    found = {index: ranks for (start, stop), ranks in iv.holders(held) for index in range(start, stop)}
    for index in range(13):
        expected = [rank for rank, of in enumerate(held) if any(start <= index < stop for start, stop in of)]
        assert list(found.get(index, ())) == expected


@given(tilings(), st.data())
def test_copies_slice_merge_and_reshard(tiling: tuple[int, Parts], data: st.DataObject) -> None:
    """From one layout's shards, put together every shard of another layout of the same dimension."""
    size, have = tiling
    _, want = data.draw(tilings(size))
    values = [index * 7 for index in range(size)]
    shards = [take(values, intervals) for intervals in have]
    for wanted in want:
        built: list[int | None] = [None] * iv.length(wanted)
        for held, shard in zip(have, shards):
            for at, to, length in iv.copies(held, wanted):
                built[to : to + length] = shard[at : at + length]
        assert built == take(values, wanted)
    for intervals in have:
        places = iv.copies([(0, size)], intervals)
        assert [values[at + i] for at, _, length in places for i in range(length)] == take(values, intervals)


def test_scale_counts_in_units() -> None:
    assert iv.scale((1, 3), 4) == (4, 12)
    assert iv.scale((0, 2), 3, offset=10) == (10, 16)


def test_replica_groups_are_ranks_with_the_same_intervals() -> None:
    assert iv.replica_groups([((0, 2),), ((2, 4),)]) == [(0,), (1,)]
    assert iv.replica_groups([((0, 2),), ((0, 2),), ((2, 4),), ((2, 4),)]) == [(0, 1), (2, 3)]
    assert iv.replica_groups([((0, 2), (4, 6)), ((2, 4), (4, 6))]) is None, "shared in part"
    assert iv.replica_groups([((0, 4),), ((0, 2),)]) is None


@given(tilings(), st.integers(1, 3), st.data())
def test_strided_copies_within_a_window_are_those_of_the_window(
    tiling: tuple[int, Parts], count: int, data: st.DataObject
) -> None:
    size, ranks = tiling
    wanted = data.draw(st.sampled_from(ranks))
    stride = size + data.draw(st.integers(0, 3))
    copies = tuple(iv.copies([(0, size)], wanted))
    strided = iv.StridedCopies(count=count, source_stride=stride, target_stride=iv.length(wanted), copies=copies)
    every = {source + at: target + at for source, target, length in strided for at in range(length)}
    assert len(every) == count * iv.length(wanted)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, count * stride)] * 2)))
    found: dict[int, int] = {}
    for group in strided.within(start, stop):
        inside = {source + at: target + at for source, target, length in group for at in range(length)}
        assert sorted(inside.values()) == list(range(*group.target_range)), "it fills its part of the target"
        assert group.is_contiguous == (group.count == 1 and len(group.copies) == 1)
        found.update(inside)
    assert found == {source: target for source, target in every.items() if start <= source < stop}
    backwards = {source + at: target + at for source, target, length in strided.reverse() for at in range(length)}
    assert backwards == {target: source for source, target in every.items()}
