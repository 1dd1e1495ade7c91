"""The parameters in which a module holds one shard: one, or two where part of the shard is replicated.

DeepSpeed counts a parameter in the gradient norm on every TP rank or on the first one only. So a shard of which some
indices are on other ranks too and some are not is held as two parameters, `weight` and `weight_shared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter, parameter_shape

SHARED = "_shared"
"""Ending of the name of the parameter that holds what other ranks hold too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldParameter:
    """A parameter of a module that holds a rank's shard, or one of the two that hold it.

    Attributes:
        name: its name, that of the plan's parameter with `_shared` at the end where it holds what is replicated.
        layout: which of its indices each rank holds.
        shape: the shape of it on all ranks together.
        copies: where it lies in the shard, along the sharded dimension: `source` in the shard, `target` in it.
        is_alone: whether it holds the shard by itself.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    copies: tuple[iv.Copy, ...]
    is_alone: bool


def held_parameters(name: str, layout: Layout, shape: tuple[int, ...], tp_rank: int) -> tuple[HeldParameter, ...]:
    """The parameters in which a rank holds its shard of `name`: one, or two where part of the shard is replicated.

    Args:
        name: the plan's parameter, with or without the module in front.
        layout: its layout.
        shape: the shape of the full parameter.
        tp_rank: the rank.
    """
    if layout.dim is None or iv.replica_groups(layout.intervals) is not None:
        size = iv.length(layout.rank_intervals(tp_rank)) if layout.dim is not None else 0
        copies = (iv.Copy(0, 0, size),)
        return (HeldParameter(name=name, layout=layout, shape=shape, copies=copies, is_alone=True),)
    return tuple(
        _one_of_two(name + ending, layout, shape, tp_rank, replicated)
        for replicated, ending in ((False, ""), (True, SHARED))
    )


def _one_of_two(name: str, layout: Layout, shape: tuple[int, ...], tp_rank: int, replicated: bool) -> HeldParameter:
    """The parameter of the indices that several ranks hold, or that one rank holds, numbered without the others."""
    assert layout.dim is not None
    indices = [interval for interval, ranks in iv.holders(layout.intervals) if (len(ranks) > 1) is replicated]
    renumbered = Layout(
        shape=(*layout.shape[: layout.dim], iv.length(indices), *layout.shape[layout.dim + 1 :]),
        dim=layout.dim,
        sub_parameters=(SubParameter(size=iv.length(indices), unit=1),),
        intervals=tuple(
            iv.join_touching([(copy.target, copy.target + copy.length) for copy in sorted(iv.copies(held, indices))])
            for held in layout.intervals
        ),
    )
    return HeldParameter(
        name=name,
        layout=renumbered,
        shape=parameter_shape(shape, layout.shape, renumbered.shape),
        copies=tuple(
            iv.Copy(copy.source + start, target, length)
            for copy in iv.copies(layout.intervals[tp_rank], indices)
            for start, target, length in iv.copies(
                ((copy.target, copy.target + copy.length),), renumbered.intervals[tp_rank]
            )
        ),
        is_alone=False,
    )


def join_held(
    held: Sequence[HeldParameter], tensors: Sequence[Tensor], layout: Layout, shape: tuple[int, ...], tp_rank: int
) -> Tensor:
    """A rank's shard of a parameter, put together from the tensors of the parameters that hold it.

    Args:
        held: the parameters from `held_parameters`.
        tensors: this rank's tensor of each, of any shape with as many elements.
        layout: the layout of the parameter.
        shape: the shape of the full parameter.
        tp_rank: the rank.
    """
    if len(held) == 1:
        return tensors[0]
    assert layout.dim is not None
    in_order = [
        (copy.source, tensor.reshape(one.layout.rank_shape(tp_rank)).narrow(layout.dim, copy.target, copy.length))
        for one, tensor in zip(held, tensors)
        for copy in one.copies
    ]
    in_order.sort(key=lambda part: part[0])
    shard = torch.cat([tensor for _, tensor in in_order], dim=layout.dim)
    return shard.reshape(parameter_shape(shape, layout.shape, shard.shape))


def slice_held(one: HeldParameter, shard: Tensor, layout: Layout, tp_rank: int) -> Tensor:
    """This rank's tensor of one of the parameters that hold `shard`. The reverse of `join_held`."""
    if one.is_alone:
        return shard
    assert layout.dim is not None
    local = shard.reshape(layout.rank_shape(tp_rank))
    part = torch.cat([local.narrow(layout.dim, copy.source, copy.length) for copy in one.copies], dim=layout.dim)
    return part.reshape(parameter_shape(one.shape, one.layout.shape, part.shape)).contiguous()


def element_copies(one: HeldParameter, layout: Layout, tp_rank: int) -> iv.StridedCopies:
    """Where the elements of a flattened parameter (`source`) lie in the flattened shard of the rank (`target`)."""
    if one.is_alone:
        return Layout(shape=layout.rank_shape(tp_rank)).shard_copies(tp_rank)
    held, shard = (iv.length(each.rank_intervals(tp_rank)) for each in (one.layout, layout))
    copies = sorted((copy.reverse() for copy in one.copies), key=lambda copy: copy.target)
    return layout.strided(copies, held, shard)
