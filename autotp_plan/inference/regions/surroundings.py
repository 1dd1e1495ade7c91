"""What reaches a region's sharded weights past the inputs of linear layers.

Weights that all units share, parameters with partial gradients, inputs of modules: what needs a collective of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autotp_plan.inference.regions.influence import Watch
from autotp_plan.inference.regions.layers import Layer, Region, Split, reach_of
from autotp_plan.inference.regions.units import Segment, segments
from autotp_plan.probes.linear import output_dim


def add_surroundings(
    model: nn.Module, layer: Layer, regions: Sequence[Region], seen: Watch, dense: Watch, norms: Sequence[str]
) -> None:
    """What reaches sharded weights past the inputs of linear layers: shared weights, partial gradients, module inputs.

    Args:
        model: the small model.
        layer: the layer.
        regions: of the layer.
        seen: of a forward pass with linear layers apart, and with the inputs of the regions' modules as leaves.
        dense: of a forward pass in which nothing is apart.
        norms: whose means were constants.
    """
    for region in regions:
        if region.experts:
            continue
        name = region.consumer.rpartition(".")[0]
        leaves = _leaves(seen, region.module) if region.module != layer.prefix else {}
        reach = reach_of(model, layer, seen, name, leaves)
        everything = (1 << region.units.size) - 1
        for parameter in layer.parameters:
            dims = {dim: found for (other, dim), found in reach.items() if other == parameter}
            owner, _, leaf = parameter.rpartition(".")
            if not dims or parameter in region.splits:
                continue
            if owner in layer.linears:
                if leaf == "weight":
                    rows = dims[output_dim(model.get_submodule(owner))]
                    _whole_linear(region, parameter, owner, output_dim(model.get_submodule(owner)), rows)
                continue
            if all(mask in (0, everything) for found in dims.values() for mask in found):
                region.partial.append(parameter)
        for argument in leaves:
            dims = {dim: found for (other, dim), found in reach.items() if other == argument}
            if dims:
                short = argument.rpartition(":")[2]
                given = dense.calls[region.module].arguments[short]
                _input(region, short, leaves[argument], dims, everything, given.requires_grad)
        region.means = [
            norm
            for norm in norms
            if f"{norm}.weight" in region.splits and len(layer.parameters[f"{norm}.weight"].shape) == 1
        ]


def _whole_linear(region: Region, parameter: str, owner: str, dim: int, rows: list[int]) -> None:
    """A linear layer whose outputs go straight to sharded weights: all of them, one shared unit, or a range of them."""
    direct = [index for index, mask in enumerate(rows) if mask]
    if len(direct) == len(rows):
        region.splits[parameter] = Split(dim=dim, segments=(Segment(unit=len(rows), shared=True),))
        region.columns.append(owner)
    elif direct == list(range(direct[0], direct[-1] + 1)):
        region.copied_outputs[owner] = (direct[0], direct[-1] + 1, len(rows))
    else:
        region.reasons.append(f"outputs of {owner} that reach sharded weights are not one range")


def _input(
    region: Region, argument: str, leaf: Tensor, dims: dict[int, list[int]], everything: int, differentiable: bool
) -> None:
    for dim, found in dims.items():
        if any(mask not in (0, everything) for mask in found):
            parts = segments(found, region.units)
            if parts is None:
                region.reasons.append(f"input {argument} is not in the order of the units")
            else:
                region.split_inputs[argument] = (dim - leaf.dim(), parts)
            return
    if differentiable:
        region.copied_inputs.append(argument)


def _leaves(seen: Watch, module: str) -> dict[str, Tensor]:
    call = seen.calls.get(module)
    if call is None:
        return {}
    return {
        f"{module}:{name}": value
        for name, value in call.arguments.items()
        if isinstance(value, Tensor) and value.is_leaf and value.requires_grad
    }


def buffers_like_parameters(model: nn.Module, region: Region) -> dict[str, str]:
    """Buffers of a region's module that are as long as a sharded parameter in it has output features.

    Buffers that checkpoints hold are parameters of a plan, and not here.
    """
    module = model.get_submodule(region.module)
    saved = module.state_dict().keys()
    lengths = {
        model.get_parameter(parameter).shape[split.dim]: parameter.removeprefix(f"{region.module}.")
        for parameter, split in region.splits.items()
        if split.dim == 0 and model.get_parameter(parameter).dim() > 1
    }
    return {
        name: lengths[buffer.shape[-1]]
        for name, buffer in module.named_buffers(recurse=False)
        if name not in saved and buffer.dim() and buffer.shape[-1] in lengths
    }
