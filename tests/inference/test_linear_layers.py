"""What inference takes for a linear layer, which can be replaced by a parallel one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autotp_plan.probes.linear import is_linear, output_dim


class Scaled(nn.Linear):
    """A linear layer with a forward that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Transposed(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight + self.bias


def test_what_counts_as_a_linear_layer() -> None:
    assert is_linear(nn.Linear(4, 8)) and output_dim(nn.Linear(4, 8)) == 0
    assert is_linear(Transposed()) and output_dim(Transposed()) == 1
    assert not is_linear(Scaled(4, 8))
    assert not is_linear(nn.LayerNorm(4))
    assert not is_linear(nn.Embedding(4, 8))
