"""Fused experts: modules that keep their forward and compute with matrices that no linear layer holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from autotp_plan.inference.regions import influence
from autotp_plan.inference.regions.influence import Axis, Masks, Watch
from autotp_plan.inference.regions.layers import Layer, Region, lay_out, place
from autotp_plan.inference.regions.units import Units, find_units
from autotp_plan.probes.linear import is_linear


def expert_regions(
    model: nn.Module, layer: Layer, seen: Watch, known: Collection[tuple[str, ...]] = ()
) -> Iterator[Region]:
    """The regions of a layer's modules that compute with several matrices of their own.

    Args:
        model: the small model.
        layer: the layer.
        seen: of a forward pass.
        known: places of consumers in other layers, which are not sought again.
    """
    for name in _expert_modules(model, layer, seen):
        leaves = [leaf for leaf, _ in model.get_submodule(name).named_parameters()]
        if any(place(model, f"{name}.{leaf}", layer.prefix) in known for leaf in leaves):
            continue
        region = _region_of_experts(model, name, seen)
        if region is not None:
            yield region


def _expert_modules(model: nn.Module, layer: Layer, seen: Watch) -> Iterator[str]:
    """The modules that compute with matrices of their own that are not linear layers'."""
    for name, module in model.named_modules():
        if not name.startswith(f"{layer.prefix}.") or is_linear(module):
            continue
        own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        if sum(p.dim() >= 3 for p in own) >= 2 or len(own) >= 2:
            call = seen.calls.get(name)
            if call is not None and any(_is_view_of(value, own) for value in call.arguments.values()):
                name = name.rpartition(".")[0]  # its weights are given to it piece by piece
            if name in seen.calls:
                yield name


def _is_view_of(value: Any, parameters: Sequence[Tensor]) -> bool:
    return isinstance(value, Tensor) and any(
        value.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in parameters
    )


def _region_of_experts(model: nn.Module, name: str, seen: Watch) -> Region | None:
    call = seen.calls[name]
    module = model.get_submodule(name)
    parameters = {f"{name}.{leaf}": parameter for leaf, parameter in module.named_parameters()}
    output = influence.first_tensor(call.output)
    if output is None or not output.requires_grad:
        return None
    matrices = {n: p for n, p in parameters.items() if p.dim() >= 2}
    best: tuple[Units, Masks, Axis] | None = None
    for parameter, tensor in matrices.items():
        for dim in range(tensor.dim()):
            if tensor.dim() >= 3 and dim == 0:
                continue  # the experts themselves
            reach = influence.interactions(call, parameters, parameter, dim)
            everything = (1 << tensor.shape[dim]) - 1
            partial = {
                axis: found
                for axis, found in reach.items()
                if any(mask not in (0, everything) for mask in found) and axis[0] != parameter
            }
            units = find_units(tensor.shape[dim], {f"{axis}": found for axis, found in partial.items()})
            if units is None or len(units.coarse) < tensor.shape[dim]:
                continue
            if best is None or len(units.coarse) > len(best[0].coarse):
                best = units, partial, (parameter, dim)
    if best is None:
        return None
    units, partial, (parameter, dim) = best
    region = Region(module=name, consumer=parameter, units=units, experts=True, reach=partial, consumer_dim=dim)
    lay_out(region)
    region.copied_inputs = [
        argument
        for argument, value in call.arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
    ]
    region.added_once = [other for other in parameters if other not in region.splits]
    return region
