"""Whether a module is a linear layer: its input times its weight, plus a bias, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes `x W^T + b` or `x W + b` and nothing else."""
    return orientation(module) is not None


def orientation(module: nn.Module) -> Literal["linear", "transposed"] | None:
    """How `module` multiplies by its weight: `x W^T + b`, or as a Conv1D `x W + b`. None where it does anything else.

    A class that is not known is tried out on small whole numbers, in training and in evaluation: Falcon's linear layer
    is a plain product, a router is not. What has parameters, buffers or modules besides `weight` and `bias` is not.
    """
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "linear"
    weight = getattr(module, "weight", None)
    inside = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if (
        not isinstance(weight, nn.Parameter)
        or weight.dim() != 2
        or inside - {"weight", "bias"}
        or next(module.children(), None) is not None
    ):
        return None
    found = {_computes(module, weight.shape, training) for training in (False, True)}
    return found.pop() if len(found) == 1 else None


def output_dim(module: nn.Module) -> int:
    """The dimension of a linear layer's weight that counts output features."""
    found = orientation(module)
    assert found is not None
    return 0 if found == "linear" else 1


_PROBE_SIZE = 3


def _computes(module: nn.Module, shape: Sequence[int], training: bool) -> Literal["linear", "transposed"] | None:
    """What a copy of `module` with a weight of 3 x 3 small whole numbers computes; its sizes are then 3 too."""
    size = _PROBE_SIZE
    small = copy.copy(module)
    for name, value in vars(module).items():
        if type(value) is int and value in shape:
            vars(small)[name] = size
    vars(small)["training"] = training
    weight = torch.arange(1.0, size * size + 1).view(size, size)
    bias = None if getattr(module, "bias", None) is None else torch.tensor([3.0, -2.0, 1.0])
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    input = torch.arange(-_PROBE_ROWS, 2.0 * _PROBE_ROWS).view(1, _PROBE_ROWS, size)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            output = functional_call(small, tensors, (input,))
    except Exception:  # a forward that wants something else is not a linear layer's
        return None
    if not isinstance(output, Tensor):
        return None
    if torch.equal(output, F.linear(input, weight, bias)):
        return "linear"
    return "transposed" if torch.equal(output, F.linear(input, weight.t(), bias)) else None


_PROBE_ROWS = 500
"""So many that a dropout of 1 % shows, and few enough that float32 sums of the numbers are exact."""
