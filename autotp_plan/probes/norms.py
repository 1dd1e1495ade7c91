"""How a norm over its weight's width takes its averages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func)
        return func(*args, **(kwargs or {}))


MEANS = {torch.mean, Tensor.mean}
_NORMS = {
    F.layer_norm, F.rms_norm, F.normalize, torch.layer_norm, torch.rms_norm, torch.var, torch.std, torch.norm,
    Tensor.var, Tensor.std, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm, torch.sum, Tensor.sum,
}  # fmt: skip


def averages_by_mean(module: nn.Module) -> bool:
    """Whether a norm takes its averages with `mean` alone, so that they can be taken over all ranks.

    Args:
        module: on any device, meta too.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    with _Recorder() as recorder, torch.no_grad():
        try:
            module.forward(torch.ones(1, weight.shape[0], device=weight.device, dtype=weight.dtype))
        except Exception:  # a forward that wants something else is not a norm's
            return False
    return bool(recorder.called & MEANS) and not recorder.called & _NORMS
