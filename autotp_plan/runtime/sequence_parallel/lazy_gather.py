"""Gathered tokens whose all-gather is deferred to their first use (`tp_overlap_comm` of a DeepSpeed config).

Where that is a column-parallel product, the tokens are gathered in chunks, and one chunk is multiplied while the next
is on its way. Whatever else uses them gets all of them, by one all-gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.sequence_parallel.collectives import gather_sequence, use_as_gathered
from autotp_plan.runtime.sequence_parallel.overlapped import GatheredProduct, Tokens
from autotp_plan.runtime.tensor_parallel.lazy_logits import Deferred
from autotp_plan.runtime.tensor_parallel.torch_internals import without_torch_function


class LazilyGatheredTokens(Deferred):
    """A rank's tokens `(batch, tokens of this rank, hidden size)` of a tensor, all-gathered at its first use."""

    sharding: tuple[Any, Tokens, int]
    """The TP process group, the tokens of each rank, and this rank."""

    @classmethod
    def of(cls, shard: Tensor, group: Any, tokens: Tokens, tp_rank: int) -> LazilyGatheredTokens:
        """The tensor of which `shard` has this rank's tokens."""
        made = shard.as_subclass(cls)
        made.sharding, made._full = (group, tokens, tp_rank), None
        return made

    def first_product(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        shard = self.shard
        if shard is None:
            return None
        full = shard.new_empty((shard.shape[0], self._length, shard.shape[2]))
        output: Tensor = GatheredProduct.apply(shard, full, weight, bias, *self.sharding)  # type: ignore[no-untyped-call]
        self._full = use_as_gathered(shard, full, *self.sharding)
        return output

    @property
    def _length(self) -> int:
        return self.sharding[1][-1][1]

    def _made_full(self, shard: Tensor) -> Tensor:
        return gather_sequence(shard, *self.sharding)

    def _held_words(self) -> str:
        with without_torch_function():
            return f"{self.shape[1]} of the tokens"

    def _outline(self) -> Tensor:
        with without_torch_function():
            shape = self.shape[0], self._length, self.shape[2]
            return torch.empty(shape, dtype=self.dtype, device="meta")

    def _of_same_kind(self, shard: Tensor) -> Tensor:
        return LazilyGatheredTokens.of(shard, *self.sharding)
