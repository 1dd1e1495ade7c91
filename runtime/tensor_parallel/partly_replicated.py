"""The parameters that a module holds one shard in: one, or two where other ranks hold part of it too.

DeepSpeed counts a parameter in the gradient norm on every rank or on the first one only. So a shard of which some
indices are on other ranks too and some are not is held as two parameters, `weight` and `weight_shared`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter, parameter_shape

SHARED = "_shared"
"""Ending of the name of the parameter that holds what other ranks hold too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A parameter of a module that holds a shard or part of one, as a layout of its own.

    `runs` are the `(position in the shard, position in the piece, length)` along the cut dimension.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]


def split_shared(name: str, layout: Layout, shape: tuple[int, ...], tp_rank: int) -> tuple[Piece, ...]:
    """The pieces that a rank holds a parameter in: one, or two where it shares part of its shard with other ranks."""
    size = iv.length(layout.rank_intervals(tp_rank)) if layout.dim is not None else 0
    if layout.dim is None or iv.replica_groups(layout.intervals) is not None:
        return (Piece(name=name, layout=layout, shape=shape, runs=((0, 0, size),)),)
    pieces = []
    for shared, ending in ((False, ""), (True, SHARED)):
        runs = [run for run, ranks in iv.holders(layout.intervals) if (len(ranks) > 1) is shared]
        own = Layout(
            shape=(*layout.shape[: layout.dim], iv.length(runs), *layout.shape[layout.dim + 1 :]),
            dim=layout.dim,
            sub_parameters=(SubParameter(size=iv.length(runs), unit=1),),
            intervals=tuple(
                iv.join_touching([(to, to + count) for _, to, count in _renumbered(held, runs)])
                for held in layout.intervals
            ),
        )
        held = iv.copies(layout.intervals[tp_rank], runs)
        compact = own.intervals[tp_rank]
        found = []
        for at, to, count in held:  # position in the shard, index in the compact numbering
            for start, in_piece, length in iv.copies(((to, to + count),), compact):
                found.append((at + start, in_piece, length))
        piece_shape = parameter_shape(shape, layout.shape, own.shape)
        pieces.append(Piece(name=name + ending, layout=own, shape=piece_shape, runs=tuple(found)))
    return tuple(pieces)


def _renumbered(held: iv.Intervals, runs: list[iv.Interval]) -> list[tuple[int, int, int]]:
    """Where `held` lies in the concatenation of `runs`, in the order of `held`."""
    return sorted(iv.copies(held, runs), key=lambda one: one[0])


def join_pieces(
    pieces: Sequence[Piece], tensors: Sequence[Tensor], layout: Layout, shape: tuple[int, ...], tp_rank: int
) -> Tensor:
    """A rank's shard of a parameter of `shape`, put together from the tensors of its pieces (of any shape)."""
    if len(pieces) == 1:
        return tensors[0]
    assert layout.dim is not None
    in_order = [
        (at, tensor.reshape(piece.layout.rank_shape(tp_rank)).narrow(layout.dim, start, count))
        for piece, tensor in zip(pieces, tensors)
        for at, start, count in piece.runs
    ]
    in_order.sort(key=lambda one: one[0])
    whole = torch.cat([tensor for _, tensor in in_order], dim=layout.dim)
    return whole.reshape(parameter_shape(shape, layout.shape, whole.shape))


def cut_piece(piece: Piece, shard: Tensor, layout: Layout, tp_rank: int) -> Tensor:
    """The tensor of one of two pieces, cut out of a rank's shard. The reverse of `join_pieces`."""
    assert layout.dim is not None
    local = shard.reshape(layout.rank_shape(tp_rank))
    part = torch.cat([local.narrow(layout.dim, at, count) for at, _, count in piece.runs], dim=layout.dim)
    return part.reshape(parameter_shape(piece.shape, piece.layout.shape, part.shape)).contiguous()


def piece_runs(piece: Piece, layout: Layout, tp_rank: int, *, only: bool) -> Iterator[tuple[int, int, int]]:
    """`(element of the shard, element of the piece, count)` of the runs of a piece: one of two, or the `only` one."""
    if only:
        yield 0, 0, math.prod(layout.rank_shape(tp_rank))
        return
    assert layout.dim is not None
    shard, held = layout.rank_shape(tp_rank), piece.layout.rank_shape(tp_rank)
    inner = math.prod(shard[layout.dim + 1 :])
    for block in range(math.prod(shard[: layout.dim])):
        for at, start, count in piece.runs:
            yield (block * shard[layout.dim] + at) * inner, (block * held[layout.dim] + start) * inner, count * inner


def whole_runs(layout: Layout, tp_rank: int) -> Iterator[tuple[int, int, int]]:
    """`(element of the whole, element of the shard, count)` of what this rank is the first to hold."""
    if layout.dim is None:
        if tp_rank == 0:
            yield 0, 0, math.prod(layout.shape)
        return
    size, mine = layout.shape[layout.dim], layout.intervals[tp_rank]
    first = [run for run, ranks in iv.holders(layout.intervals) if ranks[0] == tp_rank]
    inner = math.prod(layout.shape[layout.dim + 1 :])
    for block in range(math.prod(layout.shape[: layout.dim])):
        for start, stop in first:
            for at, further, count in iv.copies(mine, ((start, stop),)):
                whole = (block * size + start + further) * inner
                yield whole, (block * iv.length(mine) + at) * inner, count * inner
