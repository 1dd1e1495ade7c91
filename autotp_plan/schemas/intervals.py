"""Interval arithmetic: the one idea that sharding, checking, loading, merging and resharding share.

A rank's shard of a dimension is the concatenation, in the order given, of half-open intervals `(start, stop)` of that
dimension. Everything here is pure integer code on tuples. It knows nothing of tensors, names or files.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Interval = tuple[int, int]
"""Half-open: `(start, stop)`."""
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
    """`count` units over `num_ranks` ranks, one interval of units each.

    Sizes differ by at most one; the first `count % num_ranks` ranks hold the longer intervals.
    """
    size, longer = divmod(count, num_ranks)
    found: list[Interval] = []
    start = 0
    for rank in range(num_ranks):
        stop = start + size + (rank < longer)
        found.append((start, stop))
        start = stop
    return found


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
    """The longest intervals that one set of ranks holds, ascending, with the ranks that hold each."""
    return list(each_holders(per_rank))


def each_holders(per_rank: Sequence[Sequence[Interval]]) -> Iterator[tuple[Interval, tuple[int, ...]]]:
    """As `holders`, one after the other: many ranks may hold each of many intervals."""
    ordered = sorted((start, stop, rank) for rank, intervals in enumerate(per_rank) for start, stop in intervals)
    edges = sorted({edge for start, stop, _ in ordered for edge in (start, stop)})
    begun: list[tuple[int, int]] = []  # a heap: where an interval that has begun stops, and its rank
    at = 0
    waiting: tuple[Interval, tuple[int, ...]] | None = None
    for start, stop in zip(edges, edges[1:]):
        while at < len(ordered) and ordered[at][0] == start:
            heapq.heappush(begun, ordered[at][1:])
            at += 1
        while begun and begun[0][0] <= start:
            heapq.heappop(begun)
        ranks = tuple(sorted({rank for _, rank in begun}))
        if waiting is not None and waiting[1] == ranks and waiting[0][1] == start:
            waiting = ((waiting[0][0], stop), ranks)
            continue
        if waiting is not None:
            yield waiting
        waiting = ((start, stop), ranks) if ranks else None
    if waiting is not None:
        yield waiting


def most_holders(per_rank: Sequence[Sequence[Interval]]) -> int:
    """How many ranks hold the index that most ranks hold, where no rank holds one twice."""
    steps = [step for intervals in per_rank for start, stop in intervals for step in ((start, 1), (stop, -1))]
    return max(itertools.accumulate(step for _, step in sorted(steps)), default=0)


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

    def reverse(self) -> Copy:
        """The copy from target to source."""
        return Copy(self.target, self.source, self.length)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StridedCopies:
    """The same copies in each of `count` blocks, in units such as bytes or elements.

    A block begins every `source_stride` in what is held and every `target_stride` in what is wanted. `copies` are those
    of the first block, ordered by target. Iterating gives every copy, block after block.
    """

    count: int
    source_stride: int
    target_stride: int
    copies: tuple[Copy, ...]

    def __iter__(self) -> Iterator[Copy]:
        for block in range(self.count):
            source, target = block * self.source_stride, block * self.target_stride
            for copy in self.copies:
                yield Copy(source + copy.source, target + copy.target, copy.length)

    def reverse(self) -> StridedCopies:
        """The copies from target to source."""
        return StridedCopies(
            count=self.count,
            source_stride=self.target_stride,
            target_stride=self.source_stride,
            copies=tuple(sorted((copy.reverse() for copy in self.copies), key=lambda copy: copy.target)),
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether it is a single copy."""
        return self.count == len(self.copies) == 1

    @property
    def target_range(self) -> Interval:
        """The positions in the target from the first copy to the end of the last. There must be a copy."""
        last = (self.count - 1) * self.target_stride
        return self.copies[0].target, last + max(copy.target + copy.length for copy in self.copies)

    def within(self, start: int, stop: int) -> Iterator[StridedCopies]:
        """What is copied from positions `[start, stop)` of the source.

        The blocks that lie inside are one result; of the others, each part is a result with one block. Where the copies
        of a block fill its target, each result fills its `target_range`.
        """
        while start < stop:
            block, inside = divmod(start, self.source_stride)
            whole_blocks = 0 if inside else (stop - start) // self.source_stride
            if whole_blocks:
                yield from self._moved(block, whole_blocks, self.copies)
                start += whole_blocks * self.source_stride
            else:
                end = min(stop, (block + 1) * self.source_stride)
                for group in _touching(_clipped(self.copies, inside, end - block * self.source_stride)):
                    yield from self._moved(block, 1, group)
                start = end

    def _moved(self, block: int, count: int, copies: Sequence[Copy]) -> Iterator[StridedCopies]:
        source, target = block * self.source_stride, block * self.target_stride
        if copies:
            yield StridedCopies(
                count=count,
                source_stride=self.source_stride,
                target_stride=self.target_stride,
                copies=tuple(Copy(source + copy.source, target + copy.target, copy.length) for copy in copies),
            )


def _clipped(copies: Sequence[Copy], start: int, stop: int) -> Iterator[Copy]:
    """What of `copies` is copied from `[start, stop)`."""
    for source, target, length in copies:
        first, last = max(source, start), min(source + length, stop)
        if first < last:
            yield Copy(first, target + first - source, last - first)


def _touching(copies: Iterator[Copy]) -> list[list[Copy]]:
    """Copies in groups that touch in the target."""
    groups: list[list[Copy]] = []
    reached = -1
    for copy in copies:
        if copy.target != reached:
            groups.append([])
        groups[-1].append(copy)
        reached = copy.target + copy.length
    return groups
