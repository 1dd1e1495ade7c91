"""The vocabulary-parallel embedding, also for embedding classes that change what they looked up.

Gemma's `Gemma2TextScaledWordEmbedding.forward` is `super().forward(ids) * scale`. Such a class keeps its forward: it is
given a subclass in which `super().forward` is the vocabulary-parallel lookup.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp_plan.runtime.tensor_parallel.collectives import sum_over_ranks
from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer
from autotp_plan.runtime.tensor_parallel.torch_internals import eager, forward_hooks
from autotp_plan.schemas import intervals as iv


class _Bare(nn.Embedding):
    """An `nn.Embedding` that makes no table."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class VocabParallelEmbedding(PlannedLayer, _Bare):  # type: ignore[override]  # read-only
    """An embedding table sharded by rows: each rank looks up the tokens it holds, an all-reduce sums the results.

    With `defer_sum`, a function of this rank's part of the sum and the group, that makes the output in training; not
    where hooks see it, nor under torch.compile.
    """

    partition_type = "column"

    def __init__(self, module: nn.Embedding, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx
        self.sparse = False  # which DDP asks of every embedding
        self.held = self.shards.layouts["weight"].rank_intervals(self.tp_index)
        self.defer_sum: Callable[[Tensor, Any], Tensor] | None = None
        self._defers = False

    @property
    def gathers_when_read(self) -> bool:
        """Whether others read the full table: always, as it may be the head's too."""
        return True

    def __call__(self, input: Tensor) -> Tensor:
        """As any module's; also the forward of a class of its own, which may read `weight`."""
        return self._called(input, torch.compiler.is_compiling())

    @eager
    def _called(self, input: Tensor, at_once: bool) -> Tensor:
        defer = None if at_once or forward_hooks(self) or not torch.is_grad_enabled() else self.defer_sum
        self._defers = defer is not None
        output: Tensor = super().__call__(input)
        return output if defer is None else defer(output, self.mp_group)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `(...)` to `(..., embedding_dim)`, the same on every rank.

        Raises:
            IndexError: an id is not in the vocabulary; on CUDA a device-side assertion, as from an unsharded table.
        """
        if not self.is_tp_parallel:
            return F.embedding(input, self.local_weight, self.padding_idx)
        local, mine = find_held(input, self.held)
        padding_idx = None
        if self.padding_idx is not None:
            padded = iv.copies(self.held, ((self.padding_idx, self.padding_idx + 1),))
            padding_idx = padded[0][0] if padded else None
        outside = input - input % self.num_embeddings  # 0, but for an id beyond the table a row beyond every shard
        output = F.embedding(local + outside, self.local_weight, padding_idx)
        part = output.masked_fill(~mine.unsqueeze(-1), 0.0)
        return part if self._defers else sum_over_ranks(part, self.mp_group)


def find_held(ids: Tensor, held: iv.Intervals) -> tuple[Tensor, Tensor]:
    """Where `ids` lie in a rank's shard.

    Args:
        ids: token ids, of any shape.
        held: the ids that the rank holds.

    Returns:
        The position of each id in the shard (int64), 0 where the rank does not hold it; and whether it does (bool).
        Both of the shape of `ids`.
    """
    local = torch.zeros_like(ids)
    mine = torch.zeros_like(ids, dtype=torch.bool)
    at = 0
    for start, stop in held:
        inside = (ids >= start) & (ids < stop)
        local = torch.where(inside, ids - start + at, local)
        mine |= inside
        at += stop - start
    return local, mine


def vocab_parallel(module: nn.Embedding, **kwargs: Any) -> VocabParallelEmbedding:
    """The vocabulary-parallel layer that replaces `module`, with the forward of its class.

    Args:
        module: an embedding for which `can_be_vocab_parallel` holds.
        kwargs: for `VocabParallelEmbedding`.
    """
    layer = VocabParallelEmbedding(module, **kwargs)
    cls = type(module)
    if cls.forward is not nn.Embedding.forward:
        layer.__class__ = type(f"VocabParallel{cls.__name__}", (cls, VocabParallelEmbedding), {})
        saved = module.state_dict(keep_vars=True).keys()
        for name, buffer in module.named_buffers(recurse=False):
            layer.register_buffer(name, buffer, persistent=name in saved)
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in vars(layer):
                setattr(layer, name, value)
    return layer


def can_be_vocab_parallel(module: nn.Module) -> bool:
    """Whether a table of this class may be sharded: its forward reaches the weights through `super().forward` alone."""
    if not isinstance(module, nn.Embedding):
        return False
    forward = type(module).forward
    if forward is nn.Embedding.forward:
        return True
    code = list(dis.get_instructions(forward))
    calls_super = any(one.argval == "super" for one in code) and any(one.argval == "forward" for one in code)
    after_weight = [after.argval for one, after in zip(code, code[1:]) if one.argval == "weight"]
    return calls_super and all(name in ("dtype", "device") for name in after_weight)
