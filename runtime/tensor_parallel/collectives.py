"""The collectives that tensor parallelism puts into forward and backward, as autograd functions.

As in Megatron-LM (Shoeybi et al., 2019, figure 3): `copy_to_ranks` is f, `sum_over_ranks` is g. Each hands its
collective a contiguous tensor that it owns, and returns a tensor of its own: DeepSpeed's lose the sum of a
non-contiguous gradient (`dist.all_reduce(x.contiguous())`), and return a view that cannot be modified in place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autotp_plan.schemas import intervals as iv


def copy_to_ranks(input: Tensor, group: Any, *, shared: bool = False) -> Tensor:
    """`input` as it is; its gradient is summed over the ranks, each of which computes part of it.

    The copies of one tensor that are `shared` add their gradients up first, and sum them over the ranks once: those
    made in one thread, of the same tensor object, while nothing has changed it and a graph of one of them is alive.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return input.view_as(input)
    meeting = _shared_meeting(input, group) if shared else _meeting(input, group)
    result: Tensor = _Copy.apply(input.detach(), meeting)  # type: ignore[no-untyped-call]
    return result


def sum_over_ranks(input: Tensor, group: Any) -> Tensor:
    """The sum of every rank's `input`; the gradient passes unchanged, as it is the same on every rank."""
    result: Tensor = _SumOverRanks.apply(input, group)  # type: ignore[no-untyped-call]
    return result


def gather_last_dim(input: Tensor, group: Any, intervals: Sequence[iv.Intervals], tp_rank: int) -> Tensor:
    """Every rank's part of the last dimension put together; the gradient is this rank's part of the whole's.

    Valid where what follows computes the same on every rank, as a loss on gathered logits does.
    """
    held = tuple(intervals)
    result: Tensor = _GatherLastDim.apply(input, group, held, tp_rank)  # type: ignore[no-untyped-call]
    return result


def gather_shards(shard: Tensor, group: Any, intervals: Sequence[iv.Intervals], dim: int) -> Tensor:
    """The whole tensor of which `shard` is this rank's part: `intervals` of `dim`, by rank. No gradient.

    Shards of different sizes travel padded to the largest.
    """
    lengths = [iv.length(rank) for rank in intervals]
    local = shard.movedim(dim, 0)
    padded = local.new_zeros((max(lengths), *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = padded.new_empty((len(lengths) * max(lengths), *local.shape[1:]))
    dist.all_gather_into_tensor(parts, padded, group=group)
    size = max(stop for rank in intervals for _, stop in rank)
    whole = shard.new_empty((*shard.shape[:dim], size, *shard.shape[dim + 1 :]))
    along = whole.movedim(dim, 0)
    for rank, held in enumerate(intervals):
        for held_at, at, count in iv.copies(held, ((0, size),)):
            start = rank * max(lengths) + held_at
            along[at : at + count] = parts[start : start + count]
    return whole


def take(whole: Tensor, intervals: iv.Intervals, dim: int) -> Tensor:
    """A rank's shard of `whole`: the concatenation of its `intervals` of `dim`. A new, contiguous tensor."""
    parts = [whole.narrow(dim, start, stop - start) for start, stop in intervals]
    return torch.cat(parts, dim=dim).contiguous()


class _Meetings(threading.local):
    """Where the gradients of each tensor's shared copies meet: `(version of the tensor, group, meeting)`.

    Keeps neither alive: a meeting lives as long as a graph with one of the copies.
    """

    def __init__(self) -> None:
        self.of: MutableMapping[Tensor, tuple[int, Any, weakref.ref[Tensor]]] = WeakTensorKeyDictionary()


_meetings = _Meetings()


def _meeting(input: Tensor, group: Any) -> Tensor:
    """A tensor of `input`'s shape without data of its own, whose gradient is that of all copies made with it."""
    result: Tensor = _SumOfGradients.apply(input, group)  # type: ignore[no-untyped-call]
    return result


def _shared_meeting(input: Tensor, group: Any) -> Tensor:
    version, of_group, found = _meetings.of.get(input, (None, None, None))
    meeting = found() if found is not None else None
    if meeting is None or version != input._version or of_group is not group:
        meeting = _meeting(input, group)
        _meetings.of[input] = (input._version, group, weakref.ref(meeting))
    return meeting


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, meeting: Tensor) -> Tensor:
        ctx.meeting = meeting
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
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        output = input.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(output, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any, intervals: tuple[iv.Intervals, ...], tp_rank: int) -> Tensor:
        ctx.held = intervals[tp_rank]
        return gather_shards(input, group, intervals, input.dim() - 1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return take(grad_output, ctx.held, grad_output.dim() - 1), None, None, None
