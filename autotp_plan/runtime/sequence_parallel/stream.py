"""The residual stream of one model: whether it is sharded now, and which tokens each rank holds.

The number of tokens is known where the stream is sharded, in front of the first layer. Each layer is told it as an
argument, because a layer that is computed again in the backward is called after other batches have passed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.sequence_parallel.collectives import (
    gather_sequence,
    reduce_scatter_sequence,
    split_sequence,
)
from autotp_plan.runtime.sequence_parallel.lazy_gather import LazilyGatheredTokens
from autotp_plan.runtime.sequence_parallel.lazy_sum import LazilySummed
from autotp_plan.runtime.sequence_parallel.products import product_scattered
from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError


@dataclass(frozen=True, slots=True)
class StreamShape:
    """Sequences in the batch, and tokens in each of them on all ranks together."""

    batch: int
    length: int


class Stream:
    """The residual stream of one model on one rank.

    Args:
        group: the TP process group.
        tp_rank: this rank.
        tp_size: number of TP ranks.
    """

    def __init__(self, group: Any, tp_rank: int, tp_size: int) -> None:
        self.group, self.tp_rank, self.tp_size = group, tp_rank, tp_size
        self.shape: StreamShape | None = None
        """None while the stream is not sharded."""

    def __deepcopy__(self, memo: Any) -> Stream:
        return self  # a process group cannot be copied

    @contextlib.contextmanager
    def of(self, shape: StreamShape | None) -> Iterator[None]:
        """While active, the stream is that of a batch of this shape."""
        before, self.shape = self.shape, shape
        try:
            yield
        finally:
            self.shape = before

    def begin(self, hidden: Tensor) -> Tensor:
        """Shard the stream of a new batch: this rank's tokens of `(batch, length, hidden size)`."""
        self.shape = StreamShape(hidden.shape[0], hidden.shape[1])
        if not isinstance(hidden, LazilySummed):
            return self.split(hidden)
        part = hidden.shard
        return self.split(hidden.gathered()) if part is None else self._along(reduce_scatter_sequence, part)

    def end(self, hidden: Tensor) -> Tensor:
        """All tokens again; the stream is not sharded from here on."""
        full = self.gather(hidden)
        self.shape = None
        return full

    def gather(self, hidden: Tensor) -> Tensor:
        """All tokens of a tensor that is sharded along the sequence."""
        return self._along(gather_sequence, hidden, is_full=False)

    def gather_later(self, hidden: Tensor) -> Tensor:
        """As `gather`, in chunks beside the first column-parallel product, where that is the first use."""
        if type(hidden) is not Tensor or hidden.dim() != 3 or not hidden.requires_grad:
            return self.gather(hidden)
        return self._along(LazilyGatheredTokens.of, hidden, is_full=False)

    def product(self, input: Tensor, weight: Tensor, *, overlap: bool) -> Tensor:
        """This rank's tokens of the sum over the ranks of a row-parallel product."""
        return self._along(partial(product_scattered, overlap=overlap), input, weight)

    def split(self, full: Tensor) -> Tensor:
        """This rank's tokens of a tensor that is the same on every rank."""
        return self._along(split_sequence, full)

    def own_rows(self, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's tokens of a mask `(batch, length)`, and their rows of a tensor with one for each of the mask.

        The ranks hold the same rows; the gradient of these is summed.
        """
        assert self.shape is not None
        start, stop = iv.divide(self.shape.length, self.tp_size)[self.tp_rank]
        held = torch.zeros_like(mask)
        held[:, start:stop] = mask[:, start:stop]
        return mask[:, start:stop], copy_to_ranks(rows, self.group)[held[mask]]

    def _along(
        self, collective: Callable[..., Tensor], tensor: Tensor, *others: Tensor, is_full: bool = True
    ) -> Tensor:
        """A collective along the tokens of `(batch, tokens, ...)`, or of `(batch * tokens, features)`."""
        assert self.shape is not None
        tokens = tuple(iv.divide(self.shape.length, self.tp_size))
        start, stop = (0, self.shape.length) if is_full else tokens[self.tp_rank]
        found = tensor.shape[1] if tensor.dim() > 2 else tensor.shape[0] / self.shape.batch
        if found != stop - start:
            raise MismatchError(_other_length(found, stop - start, self.shape.length))
        sharding = self.group, tokens, self.tp_rank
        if tensor.dim() > 2:
            return collective(tensor, *others, *sharding)
        by_sequence = tensor.reshape(self.shape.batch, stop - start, tensor.shape[1])
        return collective(by_sequence, *others, *sharding).flatten(0, 1)


def _other_length(found: float, expected: int, length: int) -> Fault:
    return Fault(
        code="tokens-of-the-stream",
        what="a module of the sharded stream has another number of tokens than the plan says",
        where="sequence_parallel of the plan",
        got=f"{found:g} tokens, where {length} are sharded along the sequence",
        expected=f"{expected} tokens",
        next="prove the plan with autotp-plan verify; compile it without --sequence-parallel",
    )
