"""One layer of a small model: which of its weights go together (`Region`), and what lies around them.

A region is a consumer (the weight whose input features are sharded, row-parallel) with everything that its units reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from autotp_plan.inference.regions import influence
from autotp_plan.inference.regions.influence import Axis, Masks, Watch
from autotp_plan.inference.regions.units import Segment, Units, blocks, divided, find_units, labels_of, segments
from autotp_plan.probes.linear import is_linear, output_dim
from autotp_plan.probes.norms import averages_by_mean
from autotp_plan.schemas.names import is_index, starred


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How one parameter of a region is divided: the dimension and its segments."""

    dim: int
    segments: tuple[Segment, ...]


@dataclass(kw_only=True, slots=True)
class Region:
    """A consumer and the weights that go with it.

    Attributes:
        module: the module inside which activations are sharded.
        consumer: the parameter whose input features are the units.
        units: of the consumer's input features.
        splits: by parameter, the consumer too.
        columns: the linear layers whose outputs are sharded.
        partial: parameters that are whole and whose gradients are partial.
        copied_outputs: for linear layers that are whole, which of their outputs go straight to sharded weights.
        copied_inputs, split_inputs: arguments of `module`; of the latter the dimension (from the end) and its segments.
        added_once: parameters that are added to the partial sum.
        means: norms over a sharded width.
        buffers: buffers of `module` with a value for each output feature of a parameter, by which they are sharded.
        experts: whether `module` computes with its parameters itself.
        grouped: whether units that share something are kept together, on as many ranks as there are groups at most.
        inner: the splits of weights like the consumer that run before it, and whose outputs every unit needs: Mamba's
            `x_proj`.
        num_blocks: into how many blocks of units every weight is divided, each of which is sharded for itself.
        consumer_dim: the dimension of the consumer that counts its input features.
        reach: what depends on what.
        attributes: attributes of `module` that hold counts, with what they count.
        reasons: what stands in the way.
    """

    module: str
    consumer: str
    units: Units
    splits: dict[str, Split] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    copied_outputs: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    copied_inputs: list[str] = field(default_factory=list)
    split_inputs: dict[str, tuple[int, tuple[Segment, ...]]] = field(default_factory=dict)
    added_once: list[str] = field(default_factory=list)
    means: list[str] = field(default_factory=list)
    buffers: dict[str, str] = field(default_factory=dict)
    experts: bool = False
    grouped: bool = False
    inner: dict[str, Split] = field(default_factory=dict)
    num_blocks: int = 1
    consumer_dim: int = 1
    reach: Masks = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Layer:
    """A layer of a model, or all that is in none (an empty prefix)."""

    prefix: str
    parameters: dict[str, Tensor]
    linears: list[str]


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """The layers of a model: the parts of it that are numbered."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None:
            groups.setdefault(".".join(parts[: at + 1]), {})[name] = parameter
    for prefix, parameters in groups.items():
        linears = [
            name
            for name, module in model.named_modules()
            if name.startswith(f"{prefix}.") and is_linear(module) and f"{name}.weight" in parameters
        ]
        yield Layer(prefix=prefix, parameters=parameters, linears=linears)


def inner_norms(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """The norms that lie inside a layer's modules, not between them."""
    return [
        name
        for layer in layers
        for name, module in model.named_modules()
        if name.startswith(f"{layer.prefix}.")
        and "." in name.removeprefix(f"{layer.prefix}.")
        and not list(module.children())
        and averages_by_mean(module)
    ]


def place(model: nn.Module, name: str, layer: str) -> tuple[str, ...]:
    """Where a parameter is in its layer: its name there, and the classes of the modules around it."""
    inside = name.removeprefix(f"{layer}.")
    parts = inside.split(".")[:-1]
    around = [f"{layer}.{'.'.join(parts[:count])}" for count in range(1, len(parts) + 1)]
    return (inside, *(type(model.get_submodule(module)).__name__ for module in around))


def regions_of(
    model: nn.Module, layer: Layer, seen: Watch, known: Mapping[tuple[str, ...], Region], apart: Watch
) -> list[Region]:
    """The regions of a layer, those that run last first.

    Args:
        model: the small model.
        layer: the layer.
        seen: of a forward pass in which the means of inner norms were constants.
        known: regions of other layers by the place of their consumer, which are not sought again.
        apart: of a forward pass with linear layers apart.
    """
    found: list[Region] = []
    taken: set[str] = set()
    order = [name for name in seen.inputs if name in layer.linears]
    for name in reversed(order):
        module = model.get_submodule(name)
        if f"{name}.weight" in taken or not seen.inputs[name].requires_grad:
            continue
        same = known.get(place(model, f"{name}.weight", layer.prefix))
        if same is not None:
            other = same.consumer.removesuffix(f"{name}.weight".removeprefix(layer.prefix))
            taken |= {parameter.replace(other, layer.prefix, 1) for parameter in same.splits}
            continue
        out_dim = output_dim(module)
        region = _region_with_inner(model, layer, name, out_dim, apart, taken) or _region_of_linear(
            model, layer, name, out_dim, reach_of(model, layer, seen, name), taken
        )
        if region is not None:
            found.append(region)
            taken |= set(region.splits)
    return found


def reach_of(model: nn.Module, layer: Layer, seen: Watch, name: str, more: Mapping[str, Tensor] | None = None) -> Masks:
    """What the inputs of a linear layer depend on: outputs of others, as rows of their weights, and parameters."""
    sources = {
        f"{other}.weight": seen.outputs[other] for other in layer.linears if other != name and other in seen.outputs
    }
    for other, parameter in layer.parameters.items():
        if other.rpartition(".")[0] not in layer.linears:
            sources[other] = parameter
    found = influence.masks(seen.inputs[name], {**sources, **(more or {})})
    outputs = {f"{other}.weight": output_dim(model.get_submodule(other)) for other in layer.linears}
    return {
        (other, outputs.get(other, dim)): masks
        for (other, dim), masks in found.items()
        if other not in outputs or dim == sources[other].dim() - 1
    }


def _region_of_linear(
    model: nn.Module, layer: Layer, name: str, out_dim: int, reach: Masks, taken: set[str]
) -> Region | None:
    weight = layer.parameters[f"{name}.weight"]
    size = weight.shape[1 - out_dim]
    everything = (1 << size) - 1
    outputs = {f"{other}.weight": output_dim(model.get_submodule(other)) for other in layer.linears}
    sources: dict[Axis, list[int]] = {}
    for (parameter, dim), found in reach.items():
        owner, _, leaf = parameter.rpartition(".")
        if owner in layer.linears:
            if leaf == "weight" and dim == outputs[parameter] and parameter not in taken:
                sources[parameter, dim] = found
        elif parameter not in taken and any(mask not in (0, everything) for mask in found):
            sources[parameter, dim] = found
    partial = {axis: found for axis, found in sources.items() if any(mask not in (0, everything) for mask in found)}
    matrices = {axis: found for axis, found in partial.items() if layer.parameters[axis[0]].dim() >= 2}
    if not matrices:
        return None
    units = find_units(size, {f"{axis}": found for axis, found in partial.items()})
    if units is None:
        return None
    region = Region(module="", consumer=f"{name}.weight", units=units, reach=partial)
    region.columns = [parameter.removesuffix(".weight") for parameter, _ in partial if parameter in outputs]
    region.consumer_dim = 1 - out_dim
    region.module = _common([name, *(parameter.rpartition(".")[0] for parameter, _ in partial)])
    lay_out(region)
    return region


def _region_with_inner(
    model: nn.Module, layer: Layer, name: str, out_dim: int, apart: Watch, taken: set[str]
) -> Region | None:
    """The region of a linear layer and of others before it that multiply the same units; None where none does."""
    feeding = _feeding(layer, apart, name)
    inner = [one for one in sorted(feeding) if feeding & _feeding(layer, apart, one)]
    if not inner:
        return None
    reach = reach_of(model, layer, apart, name)
    region = _region_of_linear(model, layer, name, out_dim, reach, taken)
    if region is None or region.units.fine != region.units.coarse:
        return None
    for one in inner:
        weight, rows = f"{one}.weight", output_dim(model.get_submodule(one))
        to_all = reach.get((weight, rows), [])
        parts = _same_units(region, reach_of(model, layer, apart, one), layer.parameters[weight].shape[1 - rows])
        if parts is not None and to_all and all(mask == (1 << region.units.size) - 1 for mask in to_all):
            region.inner[weight] = Split(dim=1 - rows, segments=parts)
            region.copied_outputs[one] = (0, len(to_all), len(to_all))
    if not region.inner:
        return None
    region.module = _common([*region.columns, region.consumer.rpartition(".")[0], *region.copied_outputs])
    lay_out(region)
    return region


def _feeding(layer: Layer, apart: Watch, name: str) -> set[str]:
    """The linear layers whose outputs go into the input of another past no third one."""
    names = [one for one in layer.linears if one != name and one in apart.outputs]
    if not apart.inputs[name].requires_grad:
        return set()
    return influence.reached(apart.inputs[name], {one: apart.outputs[one] for one in names})


def _same_units(region: Region, reach: Masks, size: int) -> tuple[Segment, ...] | None:
    """How a linear layer's inputs are made of a region's units, by what both depend on; None where they are not."""
    unit_of: dict[int, int] = {}
    everything = (1 << size) - 1
    for axis in region.reach.keys() & reach.keys():
        labels = labels_of(region.reach[axis], region.units.size, region.units.coarse) or []
        for label, mask in zip(labels, reach[axis]):
            features = [at for at in range(size) if mask >> at & 1]
            if features and (label < 0 or mask == everything):
                return None
            if any(unit_of.setdefault(at, label) != label for at in features):
                return None
    if len(unit_of) < size:
        return None
    ones = tuple(1 << label for label in range(len(region.units.coarse)))
    return segments([ones[unit_of[at]] for at in range(size)], Units(size=len(ones), coarse=ones, fine=ones))


def lay_out(region: Region, grouped: bool = False) -> None:
    """Find how the indices of each parameter lie.

    Args:
        region: gets its splits.
        grouped: keep together what shares something: whole groups of heads are the units.
    """
    units = region.units
    counted = replace(units, fine=units.coarse) if grouped else units
    region.grouped = grouped
    region.splits = {}
    for (parameter, dim), found in region.reach.items():
        parts = segments(found, counted)
        if parts is not None and all(part.shared for part in parts) and not _is_column(region, parameter):
            region.partial = [*dict.fromkeys((*region.partial, parameter))]  # a norm of each head, say
        elif parts is None:
            region.reasons.append(f"the indices of {starred(parameter)} lie in no order that a layout can express")
        else:
            region.splits[parameter] = Split(dim=dim, segments=parts)
    if not grouped and any(segment.mixed for split in region.splits.values() for segment in split.segments):
        lay_out(region, grouped=True)
        return
    number = len(counted.fine)
    fine = counted.fine != counted.coarse
    own = Segment(unit=units.size // number, count=number, fine=fine)
    region.splits[region.consumer] = Split(dim=region.consumer_dim, segments=(own,))
    region.splits |= region.inner
    if not fine:
        _into_blocks(region)


def _is_column(region: Region, parameter: str) -> bool:
    return parameter.removesuffix(".weight") in region.columns


def _into_blocks(region: Region) -> None:
    """Divide every segment as the shortest ones are: a weight in four blocks of heads makes four of all others."""
    level = region.units.coarse
    every = [s for split in region.splits.values() for s in split.segments if not s.shared]
    number = blocks(every, len(level))
    if number <= 1:
        region.num_blocks = max(number, 1)
        if number == 0:
            region.reasons.append("weights hold their units in blocks of different sizes")
        return
    region.num_blocks = number
    count = len(level) // number
    for parameter, split in list(region.splits.items()):
        parts = tuple(part for segment in split.segments for part in divided(segment, count))
        region.splits[parameter] = Split(dim=split.dim, segments=parts)


def _common(names: Sequence[str]) -> str:
    """The innermost module that holds all of `names`."""
    parts = list(zip(*(name.split(".") for name in names)))
    same = itertools.takewhile(lambda part: len(set(part)) == 1, parts)
    return ".".join(part[0] for part in same)
