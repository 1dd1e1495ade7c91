"""A layout: which indices of a tensor each TP rank holds.

A shape, one dimension, and for each rank an ordered list of half-open intervals along it; or, when `dim` is None, the
full tensor on every rank. A layout knows no names, patterns or models: they were resolved before it was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autotp_plan.schemas import intervals as iv


@dataclass(frozen=True, kw_only=True, slots=True)
class SubParameter:
    """One of the logical matrices along the sharded dimension: `size` indices, of which each `unit` stays together."""

    size: int
    unit: int

    @classmethod
    def from_value(cls, value: Sequence[int]) -> SubParameter:
        return cls(size=value[0], unit=value[1])

    def to_value(self) -> list[int]:
        return [self.size, self.unit]

    @property
    def num_units(self) -> int:
        return self.size // self.unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one tensor is spread over the TP ranks.

    Attributes:
        shape: the shape in which it is sharded: the parameter's, or a logical view of it with the same row-major order.
        dim: the sharded dimension; None when every rank holds the full tensor.
        sub_parameters: tile `dim`; no interval may begin or end inside one of their units.
        intervals: for each rank the indices along `dim` that it holds, in the order of its shard.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    sub_parameters: tuple[SubParameter, ...] = ()
    intervals: tuple[iv.Intervals, ...] = ()

    @property
    def name(self) -> str:
        """A short name made of the contents: `4096x1024 whole`, `14336x4096 dim 0`, `6144x4096 dim 0 in 3`."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        if self.dim is None:
            return f"{shape} whole"
        most = max(len(rank) for rank in self.intervals)
        return f"{shape} dim {self.dim}" + (f" in {most}" if most > 1 else "")

    def rank_intervals(self, tp_rank: int) -> iv.Intervals:
        """The intervals of one rank along `dim`; a replicated tensor has the single one of its dimension 0."""
        if self.dim is None:
            return ((0, self.shape[0]),) if self.shape else ()
        return self.intervals[tp_rank]

    def rank_shape(self, tp_rank: int) -> tuple[int, ...]:
        """The shape, in the layout's view, of one rank's shard."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], iv.length(self.intervals[tp_rank]), *self.shape[self.dim + 1 :])

    def shard_copies(self, tp_rank: int, itemsize: int = 1) -> iv.StridedCopies:
        """How one rank's shard is copied out of the full tensor, both in row-major order.

        Args:
            tp_rank: the rank.
            itemsize: bytes of an element, for positions in bytes; with 1 they count elements.

        Returns:
            Copies that fill the shard. Of a replicated tensor, or a shard that is all of it, a single one.
        """
        if self.dim is None:
            return _single_copy(math.prod(self.shape) * itemsize)
        held = iv.join_touching(self.intervals[tp_rank])
        size = self.shape[self.dim]
        return self.strided(iv.copies(((0, size),), held), size, iv.length(held), itemsize)

    def first_held_copies(self, tp_rank: int, itemsize: int = 1) -> iv.StridedCopies:
        """As `shard_copies`, but only what no rank before `tp_rank` holds: over all ranks, every element once."""
        if self.dim is None:
            return self.shard_copies(tp_rank, itemsize) if tp_rank == 0 else _single_copy(0)
        held = iv.join_touching(self.intervals[tp_rank])
        first = iv.join_touching([found for found, ranks in iv.holders(self.intervals) if ranks[0] == tp_rank])
        copies = [
            iv.Copy(start + copy.target, copy.source, copy.length)
            for start, stop in first
            for copy in iv.copies(held, ((start, stop),))
        ]
        copies.sort(key=lambda copy: copy.target)
        return self.strided(copies, self.shape[self.dim], iv.length(held), itemsize)

    def strided(
        self, copies: Sequence[iv.Copy], source_size: int, target_size: int, itemsize: int = 1
    ) -> iv.StridedCopies:
        """Copies of indices along `dim` as copies of positions in row-major order.

        Args:
            copies: between two tensors of this layout's shape, but for the size of `dim`; ordered by target.
            source_size: the size of `dim` of the tensor that is copied from.
            target_size: the size of `dim` of the tensor that is copied to.
            itemsize: bytes of an element; with 1, positions count elements.
        """
        assert self.dim is not None
        outer = math.prod(self.shape[: self.dim])
        inner = math.prod(self.shape[self.dim + 1 :]) * itemsize
        if source_size == target_size and list(copies) == [(0, 0, source_size)]:
            return _single_copy(outer * source_size * inner)
        return iv.StridedCopies(
            count=outer,
            source_stride=source_size * inner,
            target_stride=target_size * inner,
            copies=tuple(iv.Copy(source * inner, target * inner, length * inner) for source, target, length in copies),
        )


def _single_copy(size: int) -> iv.StridedCopies:
    copies = (iv.Copy(0, 0, size),) if size else ()
    return iv.StridedCopies(count=1, source_stride=size, target_stride=size, copies=copies)


def group_view(shape: Sequence[int], view: Sequence[int]) -> list[range] | None:
    """For each dimension of `shape`, the dimensions of `view` it splits into; None when `view` does not split `shape`.

    `(8, 6) -> (2, 4, 6)` gives `[range(0, 2), range(2, 3)]`. Row-major order makes both the same bytes.
    """
    groups: list[range] = []
    at = 0
    for size in shape:
        start, product = at, 1
        while at < len(view) and (product < size or at == start):
            product *= view[at]
            at += 1
        if product != size:
            return None
        groups.append(range(start, at))
    return groups if at == len(view) else None


def parameter_shape(shape: Sequence[int], view: Sequence[int], local_view: Sequence[int]) -> tuple[int, ...]:
    """The shape of a shard of a parameter of `shape`, whose `view` has the shape `local_view` in the shard."""
    groups = group_view(shape, view)
    assert groups is not None, f"{view} is not a view of {shape}"
    return tuple(math.prod(local_view[dim] for dim in group) for group in groups)
