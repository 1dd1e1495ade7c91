"""The collectives of tensor parallelism in forward and backward, as autograd functions.

As in Megatron-LM (Shoeybi et al., 2019, figure 3): `copy_to_ranks` is f, `sum_over_ranks` is g. Each gives its
collective a new contiguous tensor, and returns a new tensor: DeepSpeed's lose the sum of a non-contiguous gradient
(`dist.all_reduce(x.contiguous())`), and return a view that cannot be modified in place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autotp_plan.runtime.tensor_parallel.kept_results import kept, kept_sum
from autotp_plan.runtime.tensor_parallel.torch_internals import base_of, eager, version_of
from autotp_plan.schemas import intervals as iv


@eager
def copy_to_ranks(input: Tensor, group: Any, *, shared: bool = False) -> Tensor:
    """`input` unchanged; its gradient is all-reduced, as each rank computes part of it.

    Args:
        input: a tensor that is the same on every rank.
        group: the TP process group.
        shared: add up the gradients of all copies of this tensor before the all-reduce, so that there is one. Those
            are the copies made with `shared` in one thread, of the same tensor object, while nothing has changed it in
            place and a graph of one of them is alive.

    Returns:
        A new view of `input`.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return input.view_as(input)
    summed = _shared_sum(input, group) if shared else _gradient_sum(input, group)
    result: Tensor = _CopyToRanks.apply(input.detach(), summed)  # type: ignore[no-untyped-call]
    return result


@eager
def sum_over_ranks(input: Tensor, group: Any, *, is_product: bool = False) -> Tensor:
    """The sum of every rank's `input`, by an all-reduce; the gradient passes unchanged, as it is equal on all ranks.

    Args:
        input: this rank's part of the sum.
        group: the TP process group.
        is_product: `input` was computed by a matrix product just now, and nothing else reads it.
    """
    result: Tensor = _SumOverRanks.apply(input, group, is_product)  # type: ignore[no-untyped-call]
    return result


@eager
def gather_last_dim(input: Tensor, group: Any, intervals: Sequence[iv.Intervals], tp_rank: int) -> Tensor:
    """All-gather a tensor that is sharded along its last dimension; the gradient is this rank's shard of the gradient.

    Valid where what follows computes the same on every rank, as a loss on gathered logits does.

    Args:
        input: this rank's shard, `(..., length of intervals[tp_rank])`.
        group: the TP process group.
        intervals: the indices that each rank holds.
        tp_rank: this rank.

    Returns:
        The full tensor, `(..., size)`.
    """
    held = tuple(intervals)
    result: Tensor = _GatherLastDim.apply(input, group, held, tp_rank)  # type: ignore[no-untyped-call]
    return result


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function of an input, a weight and a bias."""


def sum_copies_by(input: Tensor, group: Any, summed: Tensor, *, product: Product) -> None:
    """Let shared copies of `input`, and of views of all of it, add their gradients to `summed`'s.

    Args:
        input: a tensor that is the same on every rank.
        group: the TP process group.
        summed: a tensor without data, of `input`'s shape; its backward adds up every rank's gradient.
        product: a column-parallel product that does so itself, while it computes the gradient of the weight.
    """
    _shared_sums.given[input] = _Given(version_of(input), group, summed, product)


def given_product(input: Tensor, group: Any) -> Product | None:
    """The product that `sum_copies_by` was given for `input`, or for the tensor of all of which it is a view."""
    given = _given(input, group)
    return None if given is None else given.product


def gather_shards(shard: Tensor, group: Any, intervals: Sequence[iv.Intervals], dim: int) -> Tensor:
    """All-gather the tensor of which `shard` is this rank's shard. No gradient.

    Shards of different sizes are padded to the largest for the collective.

    Args:
        shard: this rank's shard.
        group: the TP process group.
        intervals: the indices of `dim` that each rank holds.
        dim: the sharded dimension.

    Returns:
        The full tensor.
    """
    lengths = [iv.length(rank) for rank in intervals]
    local = shard.movedim(dim, 0)
    padded = local.contiguous()
    if local.shape[0] < max(lengths):
        padded = local.new_zeros((max(lengths), *local.shape[1:]))
        padded[: local.shape[0]] = local
    size = max(stop for rank in intervals for _, stop in rank)
    full = shard.new_empty((*shard.shape[:dim], size, *shard.shape[dim + 1 :]))
    along = full.movedim(dim, 0)
    if along.is_contiguous() and _follow_each_other(intervals, lengths):
        dist.all_gather_into_tensor(along, padded, group=group)
        return full
    parts = padded.new_empty((len(lengths) * max(lengths), *local.shape[1:]))
    dist.all_gather_into_tensor(parts, padded, group=group)
    for rank, held in enumerate(intervals):
        for held_at, at, count in iv.copies(held, ((0, size),)):
            start = rank * max(lengths) + held_at
            along[at : at + count] = parts[start : start + count]
    return full


def _follow_each_other(intervals: Sequence[iv.Intervals], lengths: Sequence[int]) -> bool:
    """Whether each rank holds as many indices, behind those of the rank before it."""
    return all(held == ((rank * size, (rank + 1) * size),) for rank, (held, size) in enumerate(zip(intervals, lengths)))


def take(full: Tensor, intervals: iv.Intervals, dim: int) -> Tensor:
    """A rank's shard of `full`: the concatenation of its `intervals` of `dim`. A new, contiguous tensor."""
    parts = [full.narrow(dim, start, stop - start) for start, stop in intervals]
    return torch.cat(parts, dim=dim).contiguous()


class _Given(NamedTuple):
    """How gradients of copies of a tensor are summed: its version then, the group, and what does it."""

    version: int
    group: Any
    summed: Tensor
    product: Product


class _SharedSums(threading.local):
    """For each tensor with shared copies: its version when the first was made, the group, and their gradient sum.

    Keeps neither alive: a gradient sum lives as long as a graph with one of the copies.
    """

    def __init__(self) -> None:
        self.by_input: MutableMapping[Tensor, tuple[int, Any, weakref.ref[Tensor]]] = WeakTensorKeyDictionary()
        self.given: MutableMapping[Tensor, _Given] = WeakTensorKeyDictionary()
        """What `sum_copies_by` was given, as long as the inputs live."""


_shared_sums = _SharedSums()


def _gradient_sum(input: Tensor, group: Any) -> Tensor:
    """A tensor of `input`'s shape without data, whose gradient is that of all copies made with it, all-reduced."""
    result: Tensor = _SumOfGradients.apply(input, group)  # type: ignore[no-untyped-call]
    return result


def _shared_sum(input: Tensor, group: Any) -> Tensor:
    given = _given(input, group)
    if given is not None:
        return given.summed.view(input.shape)
    version, of_group, found = _shared_sums.by_input.get(input, (None, None, None))
    summed = found() if found is not None else None
    if summed is None or version != version_of(input) or of_group is not group:
        summed = _gradient_sum(input, group)
        _shared_sums.by_input[input] = (version_of(input), group, weakref.ref(summed))
    return summed


def _given(input: Tensor, group: Any) -> _Given | None:
    """What was given for `input`, or for the tensor of all of which it is a view."""
    base = base_of(input)
    original = input if base is None else base
    if input.numel() != original.numel() or not (input.is_contiguous() and original.is_contiguous()):
        return None
    found = _shared_sums.given.get(original)
    if found is None or found.version != version_of(input) or found.group is not group:
        return None
    return found


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, summed: Tensor) -> Tensor:
        ctx.summed = summed
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        return None, grad_output


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return input.new_empty(()).expand(input.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        grad_input = grad_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_input, group=ctx.group)
        return grad_input, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any, is_product: bool) -> Tensor:
        return kept_sum(lambda parts: dist.all_reduce(parts, group=group), input, is_product=is_product)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output, None, None


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any, intervals: tuple[iv.Intervals, ...], tp_rank: int) -> Tensor:
        ctx.held = intervals[tp_rank]
        return kept(lambda: gather_shards(input, group, intervals, input.dim() - 1))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return take(grad_output, ctx.held, grad_output.dim() - 1), None, None, None
