"""Products beside the collectives along the sequence (`tp_overlap_comm` of a DeepSpeed config).

The tokens of every rank are taken in chunks: while one chunk is communicated, the next is multiplied. On a GPU the
collectives run on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autotp_plan.runtime.sequence_parallel.exchanges import start_gather, start_reduce_scatter
from autotp_plan.runtime.tensor_parallel.kept_results import kept
from autotp_plan.schemas import intervals as iv

CHUNKS = 4
Tokens = tuple[iv.Interval, ...]
"""For each rank the tokens that it holds."""


class OverlappedRow(torch.autograd.Function):
    """A row-parallel product whose sum is scattered chunk by chunk, and whose gradient is gathered so."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, group: Any, tokens: Tokens, tp_rank: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.sharding = group, tokens, tp_rank

        def scattered() -> Tensor:
            waiting = [
                start_reduce_scatter(multiplied(_rows(input, chunk), weight), group, _inside(chunk), tp_rank)
                for chunk in _chunks(tokens)
            ]
            return torch.cat([wait() for wait in waiting], dim=1)

        return kept(scattered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        group, tokens, tp_rank = ctx.sharding
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        first = tokens[tp_rank][0]
        chunks = list(_chunks(tokens))
        waiting = [
            start_gather(grad[:, chunk[tp_rank][0] - first : chunk[tp_rank][1] - first], group, _inside(chunk))
            for chunk in chunks
        ]
        full = grad.new_empty((*input.shape[:-1], grad.shape[-1]))
        grad_input = torch.empty_like(input) if needs_input else None
        for chunk, wait in zip(chunks, waiting):
            rows = wait()
            _put(full, rows, chunk)
            if grad_input is not None:
                _put(grad_input, rows.matmul(weight), chunk)
        grad_weight = full.flatten(0, -2).t().matmul(input.flatten(0, -2)) if needs_weight else None
        return grad_input, grad_weight, None, None, None


class OverlappedColumn(torch.autograd.Function):
    """A column-parallel product of gathered tokens; the gradient of these is scattered while the weight's is computed.

    `shard` are this rank's tokens of `full`, which get the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        full: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Any,
        tokens: Tokens,
        tp_rank: int,
    ) -> Tensor:
        ctx.save_for_backward(full, weight)
        ctx.sharding = group, tokens, tp_rank
        return F.linear(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        full, weight = ctx.saved_tensors
        group, tokens, tp_rank = ctx.sharding
        needs_shard, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        waiting = [
            start_reduce_scatter(_rows(grad, chunk).matmul(weight), group, _inside(chunk), tp_rank)
            for chunk in (_chunks(tokens) if needs_shard else ())
        ]
        rows = grad.flatten(0, -2)
        grad_weight = rows.t().matmul(full.flatten(0, -2)) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        grad_shard = torch.cat([wait() for wait in waiting], dim=1) if needs_shard else None
        return grad_shard, None, grad_weight, grad_bias, None, None, None


class GatheredProduct(torch.autograd.Function):
    """A column-parallel product of tokens that are gathered chunk by chunk, into `full` too; backward as above."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        full: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Any,
        tokens: Tokens,
        tp_rank: int,
    ) -> Tensor:
        first = tokens[tp_rank][0]
        chunks = list(_chunks(tokens))
        waiting = [
            start_gather(shard[:, chunk[tp_rank][0] - first : chunk[tp_rank][1] - first], group, _inside(chunk))
            for chunk in chunks
        ]
        output = full.new_empty((*full.shape[:-1], weight.shape[0]))
        for chunk, wait in zip(chunks, waiting):
            rows = wait()
            _put(full, rows, chunk)
            _put(output, F.linear(rows, weight, bias), chunk)
        ctx.save_for_backward(full, weight)
        ctx.sharding = group, tokens, tp_rank
        return output

    backward = OverlappedColumn.backward


def multiplied(input: Tensor, weight: Tensor) -> Tensor:
    """`input @ weight.T`, by an operator of its own.

    torch's policy for selective checkpointing counts the calls of an operator, and this product is computed once, where
    others are computed twice.
    """
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    torch.mm(input.flatten(0, -2), weight.t(), out=output.view(-1, weight.shape[0]))
    return output


def _chunks(tokens: Tokens) -> Iterator[Tokens]:
    """Of every rank a part of its tokens: as many at a time."""
    parts = [[iv.scale(part, 1, start) for part in iv.divide(stop - start, CHUNKS)] for start, stop in tokens]
    for chunk in zip(*parts):
        if any(start < stop for start, stop in chunk):
            yield chunk


def _inside(chunk: Sequence[iv.Interval]) -> Tokens:
    """Where the tokens of each rank lie in the tensor of a chunk."""
    found, at = [], 0
    for start, stop in chunk:
        found.append((at, at + stop - start))
        at += stop - start
    return tuple(found)


def _rows(full: Tensor, chunk: Tokens) -> Tensor:
    return torch.cat([full[:, start:stop] for start, stop in chunk], dim=1)


def _put(full: Tensor, rows: Tensor, chunk: Tokens) -> None:
    for (start, stop), (at, end) in zip(chunk, _inside(chunk)):
        full[:, start:stop] = rows[:, at:end]
