"""Random weights and random tokens: the same for the dense and the sharded model, from fixed seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autotp_plan.huggingface.meta_model import parameters_and_buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Batches of two rows of `length` token ids. Nothing is padded, but the id of the padding token occurs."""

    vocab_size: int
    length: int
    padding: int | None

    def __call__(self, seed: int) -> Tensor:
        tokens = torch.randint(self.vocab_size, (2, self.length), generator=torch.Generator().manual_seed(seed))
        if self.padding is not None and 0 <= self.padding < self.vocab_size:
            tokens[0, 0] = self.padding
        return tokens


def randomise(model: nn.Module) -> None:
    """Give every parameter, and every buffer that is saved, a random value: zeros and ones hide errors.

    Matrices are normal with variance 1 / (last dimension), so that activations keep their size; vectors have a standard
    deviation of 0.2, around 1 for weights of norms and around 0 for biases.
    """
    generator = torch.Generator().manual_seed(0)
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in sorted(parameters_and_buffers(model), key=lambda item: item[0]):
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
            else:
                tensor.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
