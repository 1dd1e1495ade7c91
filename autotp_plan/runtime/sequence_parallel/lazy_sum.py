"""A sum over the ranks that is deferred to its first use: what a vocabulary-parallel embedding looked up.

The first layer of a sharded stream takes this rank's tokens of it, by a reduce-scatter. Whatever else uses it gets the
whole sum, by an all-reduce.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import sum_over_ranks
from autotp_plan.runtime.tensor_parallel.lazy_logits import Deferred


class LazilySummed(Deferred):
    """A rank's part of a sum over the ranks, all-reduced at its first use."""

    group: Any

    @classmethod
    def of(cls, part: Tensor, group: Any) -> Tensor:
        """The sum of which `part` is this rank's; made at once where `part` is of a subclass of Tensor itself."""
        if type(part) is not Tensor:  # a tensor without data, in an estimate
            return sum_over_ranks(part, group)
        made = part.as_subclass(cls)
        made.group, made._full = group, None
        return made

    def _made_full(self, shard: Tensor) -> Tensor:
        return sum_over_ranks(shard, self.group)

    def _held_words(self) -> str:
        return "a part of the sum"

    def _outline(self) -> Tensor:
        part = self.shard
        assert part is not None
        return part

    def _of_same_kind(self, shard: Tensor) -> Tensor:
        return LazilySummed.of(shard, self.group)
