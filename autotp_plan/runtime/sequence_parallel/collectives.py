"""The collectives along the sequence, as autograd functions.

The gradient of an all-gather is a reduce-scatter where each rank computes part of it, and this rank's tokens of it
where every rank computes all of it. One gathered tensor may be used in both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.sequence_parallel.exchanges import DIM, gathered, reduce_scattered
from autotp_plan.runtime.sequence_parallel.overlapped import OverlappedColumn
from autotp_plan.runtime.tensor_parallel.collectives import sum_copies_by, take
from autotp_plan.runtime.tensor_parallel.torch_internals import eager
from autotp_plan.schemas import intervals as iv


@eager
def gather_sequence(shard: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int) -> Tensor:
    """All-gather a tensor that is sharded along the sequence.

    Copies of the result (`copy_to_ranks`) sum their gradients by a reduce-scatter. Whatever else uses the result
    computes the same on every rank, and each rank takes its tokens of that gradient.

    Args:
        shard: this rank's tokens, `(batch, tokens of this rank, ...)`.
        group: the TP process group.
        tokens: the tokens that each rank holds.
        tp_rank: this rank.

    Returns:
        All tokens, on every rank: `(batch, tokens, ...)`.
    """
    return use_as_gathered(shard, None, group, tokens, tp_rank)


def use_as_gathered(
    shard: Tensor, full: Tensor | None, group: Any, tokens: Sequence[iv.Interval], tp_rank: int
) -> Tensor:
    """As `gather_sequence`, of a tensor whose tokens are gathered already: `full`."""
    full, summed = _Gather.apply(shard, full, group, tuple(tokens), tp_rank)  # type: ignore[no-untyped-call]
    if summed.requires_grad:
        sum_copies_by(full, group, summed, product=partial(_overlapped_product, shard, group, tuple(tokens), tp_rank))
    result: Tensor = full
    return result


@eager
def reduce_scatter_sequence(part: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int) -> Tensor:
    """This rank's tokens of the sum of every rank's `part`; the gradient is all-gathered.

    Args:
        part: this rank's part of the sum, `(batch, tokens, ...)`.
        group: the TP process group.
        tokens: the tokens that each rank holds.
        tp_rank: this rank.

    Returns:
        `(batch, tokens of this rank, ...)`.
    """
    result: Tensor = _ReduceScatter.apply(part, group, tuple(tokens), tp_rank)  # type: ignore[no-untyped-call]
    return result


@eager
def split_sequence(full: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int) -> Tensor:
    """This rank's tokens of a tensor that is the same on every rank; the gradient is all-gathered.

    Args:
        full: all tokens, `(batch, tokens, ...)`.
        group: the TP process group.
        tokens: the tokens that each rank holds.
        tp_rank: this rank.

    Returns:
        `(batch, tokens of this rank, ...)`.
    """
    result: Tensor = _Split.apply(full, group, tuple(tokens), tp_rank)  # type: ignore[no-untyped-call]
    return result


def _overlapped_product(
    shard: Tensor,
    group: Any,
    tokens: tuple[iv.Interval, ...],
    tp_rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A column-parallel product of the gathered tokens of `shard`, or of a view of all of them."""
    full = input.detach().view(shard.shape[0], -1, shard.shape[-1])
    output: Tensor = OverlappedColumn.apply(shard, full, weight, bias, group, tokens, tp_rank)  # type: ignore[no-untyped-call]
    return output.view(*input.shape[:-1], -1)


class _Gather(torch.autograd.Function):
    """All tokens; and a tensor without data of their shape, whose gradient is the sum of every rank's."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, found: Tensor | None, group: Any, tokens: tuple[iv.Interval, ...], tp_rank: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.sharding = group, tokens, tp_rank
        full = gathered(shard, group, tokens) if found is None else found.detach()
        return full, full.new_empty(()).expand(full.shape)

    @staticmethod
    def backward(ctx: Any, same: Tensor | None, part: Tensor | None) -> tuple[Any, ...]:
        group, tokens, tp_rank = ctx.sharding
        grad = None if part is None else reduce_scattered(part, group, tokens, tp_rank)
        if same is not None:
            own = take(same, (tokens[tp_rank],), DIM)
            grad = own if grad is None else grad + own
        return grad, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, tokens: tuple[iv.Interval, ...], tp_rank: int) -> Tensor:
        ctx.sharding = group, tokens
        return reduce_scattered(part, group, tokens, tp_rank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gathered(grad, *ctx.sharding), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, group: Any, tokens: tuple[iv.Interval, ...], tp_rank: int) -> Tensor:
        ctx.sharding = group, tokens
        return take(full, (tokens[tp_rank],), DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gathered(grad, *ctx.sharding), None, None, None
