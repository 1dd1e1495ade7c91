"""A layout: which part of a tensor each TP rank holds.

A shape, one dimension, and for each rank an ordered list of half-open intervals along it; or, when `dim` is None, the
whole tensor on every rank. A layout knows no names, patterns or models: they were resolved before it was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autotp_plan.schemas import intervals as iv


@dataclass(frozen=True, kw_only=True, slots=True)
class SubParameter:
    """One of the logical matrices along the cut dimension: `size` indices that may be cut every `unit`."""

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

    `shape` is the shape the cut is made in: the parameter's own, or a logical view of it with the same row-major order.
    `sub_parameters` tile `dim`, and no interval boundary may lie inside one of their units.
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
        """The intervals of one rank along `dim`; a tensor that is not cut has the single one of its dimension 0."""
        if self.dim is None:
            return ((0, self.shape[0]),) if self.shape else ()
        return self.intervals[tp_rank]

    def rank_shape(self, tp_rank: int) -> tuple[int, ...]:
        """The shape, in the layout's view, of one rank's shard."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], iv.length(self.intervals[tp_rank]), *self.shape[self.dim + 1 :])


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
    """The shape of a parameter of `shape` after its `view` was cut down to `local_view`."""
    groups = group_view(shape, view)
    assert groups is not None, f"{view} is not a view of {shape}"
    return tuple(math.prod(local_view[dim] for dim in group) for group in groups)
