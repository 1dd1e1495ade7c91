"""The vocabulary-parallel embedding, also for embedding classes that do something with what they looked up.

Gemma's `Gemma2TextScaledWordEmbedding.forward` is `super().forward(ids) * scale`. Such a class keeps its forward: it is
given a subclass in which `super().forward` is the vocabulary-parallel lookup.
"""

from __future__ import annotations

import dis
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp_plan.runtime.tensor_parallel.collectives import sum_over_ranks
from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer
from autotp_plan.schemas import intervals as iv


class _Bare(nn.Embedding):
    """An `nn.Embedding` that makes no table of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class VocabParallelEmbedding(PlannedLayer, _Bare):
    """An embedding table cut by rows: each rank looks up its own tokens, the results are summed."""

    partition_type = "column"

    def __init__(self, module: nn.Embedding, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx = module.padding_idx
        self.held = self.shards.layouts["weight"].rank_intervals(self.tp_index)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `(...)` to `(..., embedding_dim)`, whole on every rank."""
        if not self.is_tp_parallel:
            return F.embedding(input, self.local_weight, self.padding_idx)
        local, mine = find_held(input, self.held)
        padding_idx = None
        if self.padding_idx is not None:
            padded = iv.copies(self.held, ((self.padding_idx, self.padding_idx + 1),))
            padding_idx = padded[0][0] if padded else None
        output = F.embedding(local, self.local_weight, padding_idx)
        return sum_over_ranks(output.masked_fill(~mine.unsqueeze(-1), 0.0), self.mp_group)


def find_held(ids: Tensor, held: iv.Intervals) -> tuple[Tensor, Tensor]:
    """Where in a rank's shard `ids` are, 0 for those that it does not hold; and which it holds. Both as `ids`."""
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
    """The layer that stands for `module`: with the forward of its class, where that has one of its own."""
    layer = VocabParallelEmbedding(module, **kwargs)
    cls = type(module)
    if cls.forward is not nn.Embedding.forward:
        layer.__class__ = type(f"VocabParallel{cls.__name__}", (cls, VocabParallelEmbedding), {})
        for name, buffer in module._buffers.items():
            layer.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in vars(layer):
                setattr(layer, name, value)
    return layer


def can_be_cut(module: nn.Module) -> bool:
    """Whether a table of this class may be cut: its forward reaches the weights through `super().forward` alone."""
    if not isinstance(module, nn.Embedding):
        return False
    forward = type(module).forward
    if forward is nn.Embedding.forward:
        return True
    code = list(dis.get_instructions(forward))
    calls_super = any(one.argval == "super" for one in code) and any(one.argval == "forward" for one in code)
    after_weight = [after.argval for one, after in zip(code, code[1:]) if one.argval == "weight"]
    return calls_super and all(name in ("dtype", "device") for name in after_weight)
