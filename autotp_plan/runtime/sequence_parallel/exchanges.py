"""An all-gather and a reduce-scatter along the sequence, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import gather_shards
from autotp_plan.schemas import intervals as iv

DIM = 1
"""The dimension of the tokens."""


def gathered(shard: Tensor, group: Any, tokens: Sequence[iv.Interval]) -> Tensor:
    """All tokens, of which this rank has `shard`. No gradient."""
    return gather_shards(shard, group, [(one,) for one in tokens], DIM)


def reduce_scattered(part: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int) -> Tensor:
    """This rank's tokens of the sum of every rank's `part`. No gradient."""
    return start_reduce_scatter(part, group, tokens, tp_rank)()


def start_reduce_scatter(part: Tensor, group: Any, tokens: Sequence[iv.Interval], tp_rank: int) -> Callable[[], Tensor]:
    """Begin the sum of every rank's `part`; what is returned waits for it and gives this rank's tokens. No gradient.

    Ranks with fewer tokens than others are padded to the most for the collective. gloo's reduce-scatter is an
    all-reduce of which all but this rank's part is dropped; there, the parts are exchanged and added up here, which is
    half the bytes.
    """
    most = max(stop - start for start, stop in tokens)
    along = part.movedim(DIM, 0)
    if all(stop - start == most for start, stop in tokens):
        padded = along.contiguous()
    else:
        padded = along.new_zeros((len(tokens) * most, *along.shape[1:]))
        for rank, (start, stop) in enumerate(tokens):
            padded[rank * most : rank * most + stop - start] = along[start:stop]
    exchanges = torch.distributed.get_backend(group) == "gloo"
    start, stop = tokens[tp_rank]
    result = part.new_empty((*part.shape[:DIM], stop - start, *part.shape[DIM + 1 :]))  # no view: it may be changed
    held = result.movedim(DIM, 0)
    output = held if stop - start == most and held.is_contiguous() else padded.new_empty((most, *padded.shape[1:]))
    received = torch.empty_like(padded) if exchanges else output
    start_it = dist.all_to_all_single if exchanges else dist.reduce_scatter_tensor
    handle = start_it(received, padded, group=group, async_op=True)

    def wait() -> Tensor:
        handle.wait()
        if exchanges:
            torch.sum(received.view(len(tokens), *output.shape), dim=0, out=output)
        if output is not held:
            held.copy_(output[: stop - start])
        return result

    return wait


def start_gather(shard: Tensor, group: Any, tokens: Sequence[iv.Interval]) -> Callable[[], Tensor]:
    """Begin an all-gather; what is returned waits for it and gives all tokens. No gradient."""
    most = max(stop - start for start, stop in tokens)
    along = shard.movedim(DIM, 0)
    padded = along.new_zeros((most, *along.shape[1:]))
    padded[: along.shape[0]] = along
    parts = padded.new_empty((len(tokens) * most, *padded.shape[1:]))
    handle = dist.all_gather_into_tensor(parts, padded, group=group, async_op=True)

    def wait() -> Tensor:
        handle.wait()
        held = [parts[rank * most : rank * most + stop - start] for rank, (start, stop) in enumerate(tokens)]
        return torch.cat(held).movedim(0, DIM)

    return wait
