"""Modules that keep their own forward and meet the other ranks: fused experts, norms over a cut width, attention with
tables per head.

Such a module keeps its class's arithmetic to the last bit. It is given a subclass that does what the plan says to the
tensors that enter and leave, and the parameters of it that the plan cuts are this rank's shards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks, sum_over_ranks, take
from autotp_plan.runtime.tensor_parallel.dropout_rng import enter_cut_region, leave_cut_region
from autotp_plan.runtime.tensor_parallel.sharded_params import Shards
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.plan.document import Crossing, PlannedModule


@dataclass(frozen=True, kw_only=True, slots=True)
class Border:
    """What a module does at its border: the plan's words for it, its shards, and the ranks it meets.

    `added_once` are the parameters that are added to a sum over the ranks.
    """

    name: str
    planned: PlannedModule
    shards: Shards
    added_once: Sequence[str] = ()

    @property
    def group(self) -> Any:
        """The TP process group."""
        return self.shards.group


class BorderedModule(nn.Module):
    """The forward of a module that meets the other ranks; mixed into the module's own class."""

    share_input_gradients: bool = True
    _border: Border

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        border = self._border
        planned = border.planned
        if border.shards.tp_world_size == 1:
            return super().forward(*args, **kwargs)
        if planned.inputs:
            bound = inspect.signature(super().forward).bind(*args, **kwargs)
            for name, crossing in planned.inputs.items():
                if isinstance(bound.arguments.get(name), Tensor):
                    bound.arguments[name] = _cross(bound.arguments[name], crossing, border, self.share_input_gradients)
            args, kwargs = bound.args, bound.kwargs
        reduces = planned.output is not None and planned.output.operation == "reduce"
        if reduces and self.training:
            enter_cut_region(border.name, border.shards.tp_rank)
        with contextlib.ExitStack() as stack:
            if planned.mean_over_ranks:
                stack.enter_context(_MeanOverRanks(border))
            if border.added_once and border.shards.tp_rank != 0:
                stack.enter_context(_zeroed(self, border.added_once))
            output = super().forward(*args, **kwargs)
        if planned.output is not None:
            output = _cross(output, planned.output, border, self.share_input_gradients)
        if reduces and self.training:
            leave_cut_region()
        return output


def plan_module(module: nn.Module, border: Border) -> None:
    """Make `module` meet the ranks as `border` says, in place."""
    cls = type(module)
    module._border = border  # type: ignore[assignment]
    module.__class__ = type(f"Planned{cls.__name__}", (BorderedModule, cls), {"__module__": cls.__module__})


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func)
        return func(*args, **(kwargs or {}))


_NORMS = {
    F.layer_norm, F.rms_norm, F.normalize, torch.layer_norm, torch.rms_norm, torch.var, torch.std, torch.norm,
    Tensor.var, Tensor.std, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm, torch.sum, Tensor.sum,
}  # fmt: skip


def averages_by_mean(module: nn.Module) -> bool:
    """Whether a norm on meta takes its averages with `mean` alone, so that they can be taken over all ranks."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    with _Recorder() as recorder:
        try:
            module.forward(torch.empty(1, weight.shape[0], device="meta"))
        except Exception:  # a forward that wants something else is not a norm's
            return False
    return bool(recorder.called & {torch.mean, Tensor.mean}) and not recorder.called & _NORMS


def unknown_inputs(module: nn.Module, planned: PlannedModule) -> list[str]:
    """The inputs that the plan names and the module's forward does not have."""
    known = inspect.signature(type(module).forward).parameters
    return [name for name in planned.inputs if name not in known]


def _cross(tensor: Tensor, crossing: Crossing, border: Border, shared: bool) -> Tensor:
    if crossing.operation == "reduce":
        return sum_over_ranks(tensor, border.group)
    if crossing.operation == "copy":
        if crossing.interval is None:
            return copy_to_ranks(tensor, border.group, shared=shared)
        start, stop = crossing.interval
        before, middle, after = tensor.tensor_split((start, stop), dim=-1)
        return torch.cat((before, copy_to_ranks(middle, border.group), after), dim=-1)
    assert crossing.dim is not None and crossing.size is not None
    length = tensor.shape[crossing.dim]
    if length == 1 < crossing.size:
        return tensor
    if length % crossing.size:
        raise RuntimeError(
            f"{crossing.size} things are to be split over the ranks along dim {crossing.dim} of a tensor of "
            f"{list(tensor.shape)}"
        )
    mine = crossing.intervals[border.shards.tp_rank]
    repeated: iv.Intervals = tuple(
        (start + first, stop + first) for first in range(0, length, crossing.size) for start, stop in mine
    )
    if tensor.requires_grad:
        tensor = copy_to_ranks(tensor, border.group, shared=shared)
    return take(tensor, repeated, crossing.dim)


class _MeanOverRanks(TorchFunctionMode):
    """While active, the mean over a last dimension that is cut is that over all ranks."""

    def __init__(self, border: Border) -> None:
        super().__init__()
        self.border = border
        layout = border.shards.layouts["weight"]
        self.local = iv.length(layout.intervals[border.shards.tp_rank])
        self.total = sum(iv.length(rank) for rank in layout.intervals)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.mean, Tensor.mean):
            return func(*args, **(kwargs or {}))
        mean: Tensor = func(*args, **(kwargs or {}))
        part = mean * (self.local / self.total)
        return copy_to_ranks(sum_over_ranks(part, self.border.group), self.border.group)


@contextlib.contextmanager
def _zeroed(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The parameters `names` are zeros while active, and their gradients too."""
    try:
        for name in names:
            module.__dict__[name] = getattr(module, name) * 0  # found before what is in module._parameters
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)
