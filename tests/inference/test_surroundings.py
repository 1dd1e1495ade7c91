"""What stands in the way of replacing a linear layer by a parallel one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.inference.layers import Region
from autotp_plan.inference.surroundings import weights_read_elsewhere
from autotp_plan.inference.units import Units
from autotp_plan.probes.linear import is_linear, output_dim


class Mixer(nn.Module):
    """Computes with its layers' weights itself where there are fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, given: Tensor) -> Tensor:
        if given.is_cuda:
            return fused(given, self.in_proj(given), self.out_proj.weight)
        return self.out_proj(self.in_proj(given)).to(self.in_proj.weight.dtype)


def fused(*arguments: Any) -> Tensor:
    """Stands for a kernel."""
    return arguments[0]


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


def region(consumer: str, columns: list[str]) -> Region:
    return Region(module="", consumer=consumer, units=Units(size=8, coarse=(), fine=()), columns=columns)


def test_a_weight_that_fused_kernels_read_is_found() -> None:
    model = nn.Sequential(Mixer())
    (reason,) = weights_read_elsewhere(model, region("0.out_proj.weight", ["0.in_proj"]))
    assert reason == "Mixer reads out_proj.weight itself, as fused kernels do"
    assert not list(weights_read_elsewhere(model, region("0.in_proj.weight", []))), "its dtype does no harm"


def test_what_counts_as_a_linear_layer() -> None:
    assert is_linear(nn.Linear(4, 8)) and output_dim(nn.Linear(4, 8)) == 0
    assert is_linear(Transposed()) and output_dim(Transposed()) == 1
    assert not is_linear(Scaled(4, 8))
    assert not is_linear(nn.LayerNorm(4))
    assert not is_linear(nn.Embedding(4, 8))
