"""Interval arithmetic: the one idea that cutting, checking, loading, merging and resharding share.

A rank's shard of a dimension is the concatenation, in the order given, of half-open intervals `(start, stop)` of that
dimension. Everything here is pure integer code on tuples. It knows nothing of tensors, names or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Interval = tuple[int, int]
Intervals = tuple[Interval, ...]


def length(intervals: Sequence[Interval]) -> int:
    """Number of indices that `intervals` hold."""
    return sum(stop - start for start, stop in intervals)


def join_touching(intervals: Sequence[Interval]) -> Intervals:
    """The same indices in the same order, empty intervals dropped and touching neighbours joined."""
    joined: list[Interval] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def divide(count: int, num_ranks: int) -> list[Interval]:
    """`count` units over `num_ranks` ranks, one run of consecutive units each.

    Sizes differ by at most one; the first `count % num_ranks` ranks hold the longer runs.
    """
    size, longer = divmod(count, num_ranks)
    runs: list[Interval] = []
    start = 0
    for rank in range(num_ranks):
        stop = start + size + (rank < longer)
        runs.append((start, stop))
        start = stop
    return runs


def scale(interval: Interval, unit: int, offset: int = 0) -> Interval:
    """An interval counted in units, as an interval of indices that begins at `offset`."""
    return (offset + interval[0] * unit, offset + interval[1] * unit)


def faults(per_rank: Sequence[Sequence[Interval]], size: int) -> list[str]:
    """What is wrong with `per_rank` as a layout of a dimension of `size` indices; empty when nothing is.

    Every interval must lie inside the dimension and hold something, no rank may hold an index twice, and together the
    ranks must hold every index.
    """
    found: list[str] = []
    for rank, intervals in enumerate(per_rank):
        for start, stop in intervals:
            if not 0 <= start < stop <= size:
                found.append(f"rank {rank} holds [{start}, {stop}), which is not inside [0, {size})")
        ordered = sorted(intervals)
        for (_, stop), (start, _) in zip(ordered, ordered[1:]):
            if start < stop:
                found.append(f"rank {rank} holds index {start} twice")
    reached = 0
    for start, stop in sorted(interval for intervals in per_rank for interval in intervals):
        if start > reached:
            found.append(f"no rank holds [{reached}, {start})")
        reached = max(reached, stop)
    if reached < size:
        found.append(f"no rank holds [{reached}, {size})")
    return found


def holders(per_rank: Sequence[Sequence[Interval]]) -> list[tuple[Interval, tuple[int, ...]]]:
    """The coarsest runs of indices that one set of ranks holds, ascending, with the ranks that hold each."""
    edges = sorted({edge for intervals in per_rank for interval in intervals for edge in interval})
    runs: list[tuple[Interval, tuple[int, ...]]] = []
    for start, stop in zip(edges, edges[1:]):
        ranks = tuple(
            rank
            for rank, intervals in enumerate(per_rank)
            if any(first <= start and stop <= last for first, last in intervals)
        )
        if not ranks:
            continue
        if runs and runs[-1][1] == ranks and runs[-1][0][1] == start:
            runs[-1] = ((runs[-1][0][0], stop), ranks)
        else:
            runs.append(((start, stop), ranks))
    return runs


def replica_groups(per_rank: Sequence[Sequence[Interval]]) -> list[tuple[int, ...]] | None:
    """Ranks grouped by equal shards, by first rank; None when two ranks share some of their indices but not all."""
    for _, ranks in holders(per_rank):
        if any(tuple(per_rank[rank]) != tuple(per_rank[ranks[0]]) for rank in ranks):
            return None
    groups: dict[tuple[Interval, ...], list[int]] = {}
    for rank, intervals in enumerate(per_rank):
        groups.setdefault(tuple(intervals), []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


class Copy(NamedTuple):
    """`length` consecutive indices (or bytes) at `source` in what is held, and at `target` in what is wanted."""

    source: int
    target: int
    length: int


def copies(held: Sequence[Interval], wanted: Sequence[Interval]) -> list[Copy]:
    """Where a shard that holds `held` has the indices that a shard of `wanted` asks for, ordered by target.

    With `held = ((0, size),)` it says how to slice; with `wanted = ((0, size),)` how to merge; with two ranks of two
    plans how to reshard.
    """
    found: list[Copy] = []
    target = 0
    for want_start, want_stop in wanted:
        source = 0
        for have_start, have_stop in held:
            start, stop = max(want_start, have_start), min(want_stop, have_stop)
            if start < stop:
                found.append(Copy(source + start - have_start, target + start - want_start, stop - start))
            source += have_stop - have_start
        target += want_stop - want_start
    return sorted(found, key=lambda copy: copy.target)
