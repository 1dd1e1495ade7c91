"""The collectives along the sequence, as autograd functions.

The gradient of an all-gather is a reduce-scatter where each rank computes part of it, and this rank's tokens of it
where every rank computes all of it. One gathered tensor may be used in both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import gather_shards, sum_copies_by, take
from autotp_plan.runtime.tensor_parallel.torch_internals import eager
from autotp_plan.schemas import intervals as iv

_DIM = 1
"""The dimension of the tokens."""


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
    full, summed = _Gather.apply(shard, group, tuple(tokens), tp_rank)  # type: ignore[no-untyped-call]
    if summed.requires_grad:
        sum_copies_by(full, group, summed)
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


def gathered(shard: Tensor, group: Any, tokens: Sequence[iv.Interval]) -> Tensor:
    """All tokens, of which this rank has `shard`. No gradient."""
    return gather_shards(shard, group, [(one,) for one in tokens], _DIM)


def reduce_scattered(part: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int) -> Tensor:
    """This rank's tokens of the sum of every rank's `part`. No gradient.

    Ranks with fewer tokens than others are padded to the most for the collective.
    """
    most = max(stop - start for start, stop in tokens)
    along = part.movedim(_DIM, 0)
    if all(stop - start == most for start, stop in tokens):
        padded = along.contiguous()
    else:
        padded = along.new_zeros((len(tokens) * most, *along.shape[1:]))
        for rank, (start, stop) in enumerate(tokens):
            padded[rank * most : rank * most + stop - start] = along[start:stop]
    output = padded.new_empty((most, *padded.shape[1:]))
    _reduce_scatter(output, padded, group)
    start, stop = tokens[tp_rank]
    return output[: stop - start].movedim(0, _DIM).contiguous()


def _reduce_scatter(output: Tensor, parts: Tensor, group: Any) -> None:
    """Into `output` the sum of every rank's part for this rank.

    gloo's reduce-scatter is an all-reduce of which all but this rank's part is dropped. There, the parts are exchanged
    and added up here: half the bytes.
    """
    if torch.distributed.get_backend(group) == "gloo":
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        torch.sum(received.view(-1, *output.shape), dim=0, out=output)
    else:
        dist.reduce_scatter_tensor(output, parts, group=group)


class _Gather(torch.autograd.Function):
    """All tokens; and a tensor without data of their shape, whose gradient is the sum of every rank's."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, group: Any, tokens: tuple[iv.Interval, ...], tp_rank: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.sharding = group, tokens, tp_rank
        full = gathered(shard, group, tokens)
        return full, full.new_empty(()).expand(full.shape)

    @staticmethod
    def backward(ctx: Any, same: Tensor | None, part: Tensor | None) -> tuple[Any, ...]:
        group, tokens, tp_rank = ctx.sharding
        grad = None if part is None else reduce_scattered(part, group, tokens, tp_rank)
        if same is not None:
            own = take(same, (tokens[tp_rank],), _DIM)
            grad = own if grad is None else grad + own
        return grad, None, None, None


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
        return take(full, (tokens[tp_rank],), _DIM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gathered(grad, *ctx.sharding), None, None, None
