"""Row-parallel products whose sum over the ranks is scattered along the sequence.

The product itself is not kept: what a checkpointed layer keeps is this rank's tokens of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.sequence_parallel.exchanges import gathered, reduce_scattered
from autotp_plan.runtime.sequence_parallel.overlapped import OverlappedRow, multiplied
from autotp_plan.runtime.tensor_parallel.kept_results import kept
from autotp_plan.runtime.tensor_parallel.torch_internals import eager
from autotp_plan.schemas import intervals as iv


@eager
def product_scattered(
    input: Tensor, weight: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int, *, overlap: bool = False
) -> Tensor:
    """This rank's tokens of the sum over the ranks of `input @ weight.T`; the gradient is all-gathered.

    Args:
        input: this rank's part of the input features, `(batch, tokens, in_features)`.
        weight: this rank's part of the weight, `(out_features, in_features)`.
        group: the TP process group.
        tokens: the tokens that each rank holds.
        tp_rank: this rank.
        overlap: communicate in chunks, beside the products.

    Returns:
        `(batch, tokens of this rank, out_features)`.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
    if overlap:
        in_chunks: Tensor = OverlappedRow.apply(input, weight, group, tuple(tokens), tp_rank)  # type: ignore[no-untyped-call]
        return in_chunks
    product = _Product.apply(input, weight)  # type: ignore[no-untyped-call]
    operands = input.detach(), weight.detach()
    result: Tensor = _Scattered.apply(product, *operands, group, tuple(tokens), tp_rank)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """The product without its data: it is never kept, and where a layer is computed again it may not be needed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return input.new_empty(()).expand(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad
        grad_input = grad.matmul(weight) if needs_input else None
        grad_weight = grad.flatten(0, -2).t().matmul(input.flatten(0, -2)) if needs_weight else None
        return grad_input, grad_weight


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Tensor,
        input: Tensor,
        weight: Tensor,
        group: Any,
        tokens: tuple[iv.Interval, ...],
        tp_rank: int,
    ) -> Tensor:
        ctx.sharding = group, tokens
        return kept(lambda: reduce_scattered(multiplied(input, weight), group, tokens, tp_rank))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gathered(grad, *ctx.sharding), None, None, None, None, None
