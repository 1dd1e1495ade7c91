"""Where a weight's parts lie in its rectangle: exact integers of indices along one side, and the rectangle's pixels.

A matrix is drawn with dimension 0 from left to right and dimension 1 from top to bottom, so that a column-parallel
weight falls into columns and a row-parallel one into rows. A side of n indices is `SCALE` times the root of n long;
along it, parts are to linear scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autotp_plan.planner.pictures.colours import group_of
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, group_view
from autotp_plan.schemas.plan.entries import Style

SCALE = 1.4
"""Pixels of the root of a number of indices: a side of 4096 is 90 pixels long."""
SHORTEST, LONGEST, STRIP = 5.0, 720.0, 7.0
"""Pixels of a side at least, at most, and of the height of what has one dimension."""
MOST_PIECES = 600
"""Of a weight with more the first are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Indices `[start, stop)` along the sharded side, and of their thickness the share `[top, bottom)` of `lanes`.

    `group` is the colour: the rank, or a group of neighbouring ranks. None for what all ranks hold.
    """

    group: int | None
    start: int
    stop: int
    top: int = 0
    bottom: int = 1
    lanes: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A weight as a rectangle in pixels, in pieces along one side.

    Attributes:
        width: pixels from left to right.
        height: pixels from top to bottom.
        length: indices along the sharded side.
        across: whether that side runs from left to right.
        pieces: who holds what; together they fill the rectangle once, if all are here.
        parts: where a fused weight's parts begin and end, in indices; only the two ends of others.
        units: indices that stay together, such as a head's; 1 where each stands for itself.
        depth: how many such matrices there are: experts, for example.
        is_complete: whether all pieces are here, and not the first `MOST_PIECES`.
    """

    width: float
    height: float
    length: int
    across: bool
    pieces: tuple[Piece, ...]
    parts: tuple[int, ...]
    units: int = 1
    depth: int = 1
    is_complete: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether every rank holds all of it."""
        return [piece.group for piece in self.pieces] == [None]

    @property
    def pixels_per_index(self) -> float:
        """Pixels along the sharded side."""
        return (self.width if self.across else self.height) / max(1, self.length)


def draw(layout: Layout, shape: Sequence[int], style: Style, tp_size: int) -> Drawing:
    """The drawing of a parameter.

    Args:
        layout: how it is sharded, in its own shape or in a view of it.
        shape: the parameter's.
        style: how its module runs: which of two dimensions is the output's.
        tp_size: number of TP ranks.
    """
    dim, repeat, inner = _sharded_dim(layout, shape)
    across, down, depth, is_across = _plane(shape, dim, style)
    width, height = _pixels(across), _pixels(down) if len(shape) > 1 else STRIP
    if dim is None or layout.dim is None:
        one = Piece(group=None, start=0, stop=1)
        return Drawing(width=width, height=height, length=1, across=True, pieces=(one,), parts=(0, 1), depth=depth)
    size = layout.shape[layout.dim]
    block = tuple(itertools.islice(_pieces(layout.intervals, tp_size), MOST_PIECES + 1))
    every = (_moved(piece, number * size, inner) for number in range(repeat) for piece in block)
    pieces = tuple(itertools.islice(every, MOST_PIECES))
    edges = [0]
    for sub in layout.sub_parameters:
        edges.append(edges[-1] + sub.size)
    units = {sub.unit for sub in layout.sub_parameters}
    return Drawing(
        width=width,
        height=height,
        length=repeat * size * inner,
        across=is_across,
        pieces=pieces,
        parts=tuple(edge * inner for edge in edges) if repeat == 1 else (0, repeat * size * inner),
        units=units.pop() * inner if len(units) == 1 and repeat == 1 else 1,
        depth=depth,
        is_complete=len(pieces) == repeat * len(block),
    )


def _moved(piece: Piece, offset: int, inner: int) -> Piece:
    """A piece of a view as a piece of the parameter: blocks before it, indices within it."""
    return Piece(
        group=piece.group,
        start=(offset + piece.start) * inner,
        stop=(offset + piece.stop) * inner,
        top=piece.top,
        bottom=piece.bottom,
        lanes=piece.lanes,
    )


def _sharded_dim(layout: Layout, shape: Sequence[int]) -> tuple[int | None, int, int]:
    """The parameter's dimension that is sharded; how often the view's repeats in it; indices of one of the view's."""
    if layout.dim is None:
        return None, 1, 1
    groups = group_view(shape, layout.shape)
    assert groups is not None, "a plan that was read has views of its parameters"
    dim = next(at for at, group in enumerate(groups) if layout.dim in group)
    before = math.prod(layout.shape[at] for at in groups[dim] if at < layout.dim)
    return dim, before, math.prod(layout.shape[at] for at in groups[dim] if at > layout.dim)


def _plane(shape: Sequence[int], dim: int | None, style: Style) -> tuple[int, int, int, bool]:
    """Indices across and down, the number of matrices, and whether the sharded dimension runs across."""
    sizes, depth = tuple(shape), 1
    if len(sizes) == 3 and sizes[0] > 1 and min(sizes[1:]) > 1 and dim != 0:
        sizes, depth = sizes[1:], sizes[0]
        dim = None if dim is None else dim - 1
    if len(sizes) == 2:
        if style in ("column", "vocab", "row"):
            is_across = style != "row"
            swapped = dim == (1 if is_across else 0)  # Conv1D: its dimension 0 is the input's
            return *(sizes[::-1] if swapped else sizes), depth, is_across
        return *sizes, depth, dim in (None, 0)
    at = dim or 0
    across = sizes[at] if sizes else 1
    return across, math.prod(sizes[:at] + sizes[at + 1 :]), depth, True


def _pixels(indices: int) -> float:
    return min(LONGEST, max(SHORTEST, SCALE * math.sqrt(indices)))


def _pieces(per_rank: Sequence[Sequence[iv.Interval]], tp_size: int) -> Iterator[Piece]:
    """The pieces of one block, ascending; touching ones of one colour joined."""
    waiting: Piece | None = None
    for (start, stop), ranks in iv.each_holders(per_rank):
        for piece in _lanes(start, stop, ranks, tp_size):
            if waiting is not None and _continues(waiting, piece):
                waiting = Piece(group=piece.group, start=waiting.start, stop=piece.stop)
                continue
            if waiting is not None:
                yield waiting
            waiting = piece
    if waiting is not None:
        yield waiting


def _continues(piece: Piece, following: Piece) -> bool:
    same = piece.group == following.group and piece.lanes == following.lanes == 1
    return same and piece.stop == following.start


def _lanes(start: int, stop: int, ranks: Sequence[int], tp_size: int) -> Iterator[Piece]:
    """The indices `[start, stop)` with a lane for each rank that holds them."""
    if len(ranks) == tp_size > 1:
        yield Piece(group=None, start=start, stop=stop)
        return
    groups = [group_of(rank, tp_size) for rank in ranks]
    if len(set(groups)) == 1:
        yield Piece(group=groups[0], start=start, stop=stop)
        return
    top = 0
    while top < len(groups):
        bottom = top + groups[top:].count(groups[top])
        yield Piece(group=groups[top], start=start, stop=stop, top=top, bottom=bottom, lanes=len(groups))
        top = bottom
