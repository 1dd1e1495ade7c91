"""The residual stream of one model: whether it is sharded now, and which tokens each rank holds.

The number of tokens is known where the stream is sharded, in front of the first layer. Each layer is told it as an
argument, because a layer that is computed again in the backward is called after other batches have passed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autotp_plan.runtime.sequence_parallel.collectives import (
    gather_sequence,
    reduce_scatter_sequence,
    split_sequence,
)
from autotp_plan.schemas import intervals as iv


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
        return self.split(hidden)

    def end(self, hidden: Tensor) -> Tensor:
        """All tokens again; the stream is not sharded from here on."""
        full = self.gather(hidden)
        self.shape = None
        return full

    def gather(self, hidden: Tensor) -> Tensor:
        """All tokens of a tensor that is sharded along the sequence."""
        return gather_sequence(hidden, self.group, *self._sharding(hidden))

    def reduce_scatter(self, part: Tensor) -> Tensor:
        """This rank's tokens of the sum over the ranks."""
        return reduce_scatter_sequence(part, self.group, *self._sharding(part))

    def split(self, full: Tensor) -> Tensor:
        """This rank's tokens of a tensor that is the same on every rank."""
        return split_sequence(full, self.group, *self._sharding(full))

    def _sharding(self, tensor: Tensor) -> tuple[list[iv.Interval], int, int]:
        """The tokens of each rank, this rank, and the dimension of the tokens.

        Code that makes `(batch * tokens, hidden size)` of the stream looks at each token by itself: there, all of a
        rank's tokens lie together, and the ranks' follow each other.
        """
        assert self.shape is not None
        tokens = iv.divide(self.shape.length, self.tp_size)
        if tensor.dim() > 2:
            return tokens, self.tp_rank, 1
        return [iv.scale(one, self.shape.batch) for one in tokens], self.tp_rank, 0
