"""Wrappers that add collectives at a module's inputs and outputs: fused experts, norms over a sharded width, attention
with tables per head.

Such a module keeps its class's arithmetic to the last bit. It is given a subclass that does what the plan says to the
tensors that enter and leave, and its sharded parameters are this rank's shards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autotp_plan.runtime.parameters.state_dicts import HoldsShards
from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks, sum_over_ranks, take
from autotp_plan.runtime.tensor_parallel.dropout_rng import enter_sharded_region, leave_sharded_region
from autotp_plan.runtime.tensor_parallel.sharded_params import ShardedParams
from autotp_plan.runtime.tensor_parallel.torch_internals import eager
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.plan.document import Crossing, PlannedModule


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """Which collectives a module has at its inputs and outputs.

    Attributes:
        name: its name in the model.
        planned: what the plan says of its inputs and outputs.
        shards: its sharded parameters.
        added_once: its parameters that are added to a sum over the ranks, which one rank alone may add.
    """

    name: str
    planned: PlannedModule
    shards: ShardedParams
    added_once: Sequence[str] = ()

    @property
    def group(self) -> Any:
        """The TP process group."""
        return self.shards.group

    @property
    def reduces(self) -> bool:
        """Whether the module computes this rank's part of a sum."""
        return self.planned.output is not None and self.planned.output.operation == "reduce"


class WithCollectives(HoldsShards):
    """The forward of a module with collectives at its inputs and outputs; mixed into the module's class."""

    share_input_gradients: bool = True
    tp_boundary: Boundary

    def held_shards(self) -> ShardedParams:
        return self.tp_boundary.shards

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        boundary = self.tp_boundary
        if boundary.shards.tp_world_size == 1:
            return super().forward(*args, **kwargs)
        args, kwargs = self._enter(args, kwargs)
        if boundary.planned.mean_over_ranks or boundary.added_once:
            output = self._changed_forward(args, kwargs)
        else:
            output = super().forward(*args, **kwargs)
        return self._leave(output)

    @eager
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, after the collectives of the module's inputs."""
        boundary = self.tp_boundary
        if boundary.planned.inputs:
            bound = inspect.signature(super().forward).bind(*args, **kwargs)
            for name, crossing in boundary.planned.inputs.items():
                if isinstance(bound.arguments.get(name), Tensor):
                    bound.arguments[name] = _communicate(
                        bound.arguments[name], crossing, boundary, self.share_input_gradients
                    )
            args, kwargs = bound.args, bound.kwargs
        if boundary.reduces and self.training:
            enter_sharded_region(boundary.name, boundary.shards.tp_rank)
        return args, kwargs

    @eager
    def _changed_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward with averages over the ranks, or without what another rank adds."""
        boundary = self.tp_boundary
        with contextlib.ExitStack() as stack:
            if boundary.planned.mean_over_ranks:
                stack.enter_context(_MeanOverRanks(boundary))
            if boundary.added_once and boundary.shards.tp_rank != 0:
                stack.enter_context(_zeroed(self, boundary.added_once))
            return super().forward(*args, **kwargs)

    @eager
    def _leave(self, output: Any) -> Any:
        """The output, after its collective."""
        boundary = self.tp_boundary
        if boundary.planned.output is not None:
            output = _communicate(output, boundary.planned.output, boundary, self.share_input_gradients)
        if boundary.reduces and self.training:
            leave_sharded_region()
        return output


def add_collectives(module: nn.Module, boundary: Boundary) -> None:
    """Add collectives at the inputs and outputs of `module`, in place: its class becomes a subclass of what it was.

    A parameter that is held as two, because other ranks hold a part of it, is read as one.
    """
    cls = type(module)
    joined = {leaf: _joined(leaf) for leaf, held in boundary.shards.held.items() if len(held) > 1}
    module.tp_boundary = boundary  # type: ignore[assignment]
    module.__class__ = type(f"Planned{cls.__name__}", (WithCollectives, cls), {"__module__": cls.__module__, **joined})


def _joined(leaf: str) -> property:
    def shard(module: WithCollectives) -> Tensor:
        return module.tp_boundary.shards.shard(module, leaf)

    return property(shard)


def unknown_inputs(module: nn.Module, planned: PlannedModule) -> list[str]:
    """The inputs that the plan names and the module's forward does not have."""
    known = inspect.signature(type(module).forward).parameters
    return [name for name in planned.inputs if name not in known]


def _communicate(tensor: Tensor, crossing: Crossing, boundary: Boundary, shared: bool) -> Tensor:
    if crossing.operation == "reduce":
        return sum_over_ranks(tensor, boundary.group)
    if crossing.operation == "copy":
        if crossing.interval is None:
            return copy_to_ranks(tensor, boundary.group, shared=shared)
        start, stop = crossing.interval
        before, middle, after = tensor.tensor_split((start, stop), dim=-1)
        return torch.cat((before, copy_to_ranks(middle, boundary.group), after), dim=-1)
    assert crossing.dim is not None and crossing.size is not None
    length = tensor.shape[crossing.dim]
    if length == 1 < crossing.size:
        return tensor
    if length % crossing.size:
        raise RuntimeError(
            f"Dim {crossing.dim} of a tensor of {list(tensor.shape)} cannot be sharded: it is no multiple of the "
            f"{crossing.size} indices (heads, say) that the plan shards over the ranks."
        )
    held = crossing.intervals[boundary.shards.tp_rank]
    repeated: iv.Intervals = tuple(
        (start + first, stop + first) for first in range(0, length, crossing.size) for start, stop in held
    )
    if tensor.requires_grad:
        tensor = copy_to_ranks(tensor, boundary.group, shared=shared)
    return take(tensor, repeated, crossing.dim)


class _MeanOverRanks(TorchFunctionMode):
    """While active, the mean over a sharded last dimension is the mean over all ranks."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary
        layout = boundary.shards.layouts["weight"]
        self.local = iv.length(layout.intervals[boundary.shards.tp_rank])
        self.total = sum(iv.length(rank) for rank in layout.intervals)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.mean, Tensor.mean):
            return func(*args, **(kwargs or {}))
        mean: Tensor = func(*args, **(kwargs or {}))
        part = mean * (self.local / self.total)
        return copy_to_ranks(sum_over_ranks(part, self.boundary.group), self.boundary.group)


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
