"""The plan of a twin, a small model of the same architecture, sharded in the same places.

Every layout, module attribute and crossing is taken from the plan and scaled to the twin's sizes. No rule is consulted
again, so whatever is wrong in the plan is wrong in the twin's plan too, and shows.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn

from autotp_plan.huggingface import scale_config
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter, group_view
from autotp_plan.schemas.names import expand, is_index
from autotp_plan.schemas.plan.document import (
    Crossing,
    ModuleAttribute,
    Parameter,
    Plan,
    PlannedModule,
    RuntimeOptions,
    SequenceParallel,
)
from autotp_plan.schemas.plan.rule_ref import NO_RULE

_FLOATS = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})


class TwinError(Exception):
    """Sizes of a plan that cannot be scaled to those of a twin. A twin of other sizes may do."""


def num_layers_needed(plan: Plan, config: Mapping[str, Any]) -> int | None:
    """How many of the first layers include every kind of layer: two at least, None for a model without layers.

    Two layers are of one kind when the plan shards them in the same way and the config's lists say the same of them.
    """
    depth = scale_config.num_layers(config)
    kinds = None if depth is None else _layer_kinds(plan, depth)
    if depth is None or kinds is None:
        return None
    first: dict[Any, int] = {}
    for layer in range(depth):
        first.setdefault((kinds[layer], scale_config.per_layer(config, layer)), layer)
    return min(depth, max(2, 1 + max(first.values())))


def twin_plan(plan: Plan, original: nn.Module, twin: nn.Module, divisor: int, dtype: str = "F64") -> Plan:
    """The plan of `twin`.

    Args:
        plan: the plan of `original`.
        original: the model at full size; both models may be on meta.
        twin: its widths are those of `original` divided by `divisor`.
        divisor: see above.
        dtype: of all floating-point parameters.

    Returns:
        A plan with the same rules, its layouts, module attributes and modules scaled.

    Raises:
        TwinError: a size does not scale.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters_and_buffers(twin)}
    layouts: dict[Layout, str] = {}
    parameters = []
    for parameter in plan.expanded():
        if parameter.name in shapes:
            shape, layout = shapes[parameter.name], plan.layouts[parameter.layout]
            scaled = scaled_layout(layout, plan.shape_of(parameter), shape, divisor)
            name = layouts.setdefault(scaled, f"{len(layouts)}: {scaled.name}")
            parameters.append(_scaled_parameter(parameter, name, scaled, shape, dtype))
    held = {parameter.name for parameter in parameters}
    config = plan.model.config or {}
    modules = dict(twin.named_modules())
    return replace(
        plan,
        layouts={name: layout for layout, name in layouts.items()},
        parameters=tuple(parameters),
        module_attributes=tuple(
            _scaled_attribute(replace(entry, module=name), original, twin)
            for entry in plan.module_attributes
            for name in expand(entry.module)
            if name in modules
        ),
        modules=tuple(
            _scaled_module(replace(entry, module=name), config, divisor)
            for entry in plan.modules
            for name in expand(entry.module)
            if name in modules
        ),
        sequence_parallel=_scaled_stream(plan.sequence_parallel, modules),
        tied=tuple(tie for tie in plan.tied if tie.to in held and tie.name in shapes),
        ignored=(),
        runtime=RuntimeOptions(tp_overlap_comm=plan.runtime.tp_overlap_comm),
        notes=(),
        verified=None,
    )


def scaled_layout(layout: Layout, shape: tuple[int, ...], new_shape: tuple[int, ...], divisor: int) -> Layout:
    """The layout that shards a parameter of `new_shape` where `layout` shards one of `shape`.

    Args:
        layout: its shape is a view of `shape`.
        shape: of the parameter in the original model.
        new_shape: of the same parameter in the twin.
        divisor: of the model's widths, to choose among possible views of `new_shape`.

    Returns:
        A layout whose boundaries fall on the same heads, groups or fractions. Where a boundary would fall between two
        indices it is rounded up.

    Raises:
        TwinError: some rank would hold nothing, or a size is not an integer.
    """
    if layout.dim is None:
        return Layout(shape=new_shape)
    rounded: Layout | None = None
    for view in _views(layout, shape, new_shape, divisor):
        scaled, exact = _scaled_boundaries(layout, view, divisor)
        if exact and scaled is not None:
            return scaled
        rounded = rounded or scaled
    if rounded is None:
        raise TwinError(f"{layout.name} of {list(shape)} cannot be sharded in the same places in {list(new_shape)}")
    return rounded


def _layer_kinds(plan: Plan, depth: int) -> list[frozenset[Any]] | None:
    """What the plan says of each layer, under names without its number; None when no names are numbered by layer."""
    found: dict[str, dict[int, set[Any]]] = defaultdict(lambda: defaultdict(set))

    def add(name: str, what: Any) -> None:
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None:
            found[".".join(parts[:at])][int(parts[at])].add((".".join(parts[at + 1 :]), what))

    for entry in plan.expanded():
        add(entry.name, replace(entry, name="", rule=NO_RULE, source=None, sources=None))
    for attribute in plan.module_attributes:
        for name in expand(attribute.module):
            add(name, (attribute.attribute, attribute.values))
    for module in plan.modules:
        for name in expand(module.module):
            add(name, repr(replace(module, module="")))
    sharded = {_list_of(entry.name) for entry in plan.expanded() if plan.layouts[entry.layout].dim is not None}
    lists = sorted(found.items(), key=lambda item: item[0] not in sharded)  # a vision tower may be as deep
    layers = next((layers for _, layers in lists if layers.keys() == set(range(depth))), None)
    return None if layers is None else [frozenset(layers[layer]) for layer in range(depth)]


def _list_of(name: str) -> str:
    """The list of layers that a parameter is in: `model.layers`."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if is_index(part)), len(parts))
    return ".".join(parts[:at])


def _scaled_parameter(parameter: Parameter, name: str, layout: Layout, shape: tuple[int, ...], dtype: str) -> Parameter:
    sources = parameter.sources
    if sources is not None and sources.stacked:
        sources = replace(sources, count=shape[0])
    return replace(
        parameter,
        layout=name,
        shape=None if shape == layout.shape else shape,
        dtype=dtype if parameter.dtype in _FLOATS else parameter.dtype,
        sources=sources,
    )


def _views(
    layout: Layout, shape: tuple[int, ...], new_shape: tuple[int, ...], divisor: int
) -> Iterator[tuple[int, ...]]:
    """The views of `new_shape` that correspond to the layout's view of `shape`, likely ones first.

    Where several dimensions of the view make one of the parameter, all but one are unchanged or divided by `divisor`.
    """
    groups = group_view(shape, layout.shape)
    if groups is None or len(shape) != len(new_shape):
        return
    choices: list[list[tuple[int, ...]]] = []
    for size, group in zip(new_shape, groups):
        old = [layout.shape[dim] for dim in group]
        found: list[tuple[int, ...]] = []
        kept_first = sorted(range(len(old)), key=lambda place: group[place] == layout.dim)
        for free in kept_first:  # the dimension that takes what the others leave
            options = [(n // divisor, n) if n % divisor == 0 else (n,) for n in old]
            for rest in itertools.product(*(options[place] for place in range(len(old)) if place != free)):
                product = math.prod(rest)
                if product and size % product == 0:
                    found.append((*rest[:free], size // product, *rest[free:]))
        choices.append(list(dict.fromkeys(found)))
    for combination in itertools.product(*choices):
        yield tuple(itertools.chain.from_iterable(combination))


def _scaled_boundaries(layout: Layout, view: tuple[int, ...], divisor: int) -> tuple[Layout | None, bool]:
    """`layout` for a tensor of shape `view`, and whether every boundary fell between units.

    Boundaries are counted in units and rounded up, so that a weight and the one that consumes its output, which have as
    many units, are still sharded in the same places.
    """
    assert layout.dim is not None
    sizes = _scaled_sizes([sub.size for sub in layout.sub_parameters], view[layout.dim], divisor)
    if any(size.denominator > 1 or size < 1 for size in sizes):
        return None, False
    sub_parameters = []
    for sub, size in zip(layout.sub_parameters, sizes):
        unit = sub.unit * size / sub.size
        kept = int(unit) if unit.denominator == 1 and unit >= 1 else sub.unit
        sub_parameters.append(SubParameter(size=int(size), unit=kept if int(size) % kept == 0 else 1))
    exact = True
    starts, new_starts = (
        [0, *itertools.accumulate(sub.size for sub in subs)] for subs in (layout.sub_parameters, sub_parameters)
    )

    def boundary(old: int) -> int:
        nonlocal exact
        index = max(place for place, start in enumerate(starts) if start <= old)
        if index == len(sub_parameters):
            return new_starts[index]
        sub, scaled = layout.sub_parameters[index], sub_parameters[index]
        units = Fraction((old - starts[index]) * scaled.num_units, sub.size)
        exact = exact and units.denominator == 1
        return new_starts[index] + math.ceil(units) * scaled.unit

    intervals = tuple(tuple((boundary(start), boundary(stop)) for start, stop in rank) for rank in layout.intervals)
    if any(start >= stop for rank in intervals for start, stop in rank):
        return None, False
    return Layout(shape=view, dim=layout.dim, sub_parameters=tuple(sub_parameters), intervals=intervals), exact


def _scaled_sizes(sizes: Sequence[int], total: int, divisor: int) -> list[Fraction]:
    """The sizes of sub-parameters in a dimension of `total`: all scaled alike, or some not, which count heads."""
    ratio = Fraction(total, sum(sizes))
    if ratio not in (1, Fraction(1, divisor)) and len(sizes) <= _MOST_MIXED:
        for factors in itertools.product((Fraction(1, divisor), Fraction(1)), repeat=len(sizes)):
            scaled = [size * factor for size, factor in zip(sizes, factors)]
            if sum(scaled) == total and all(size.denominator == 1 for size in scaled):
                return scaled
    return [size * ratio for size in sizes]


_MOST_MIXED = 8


def _scaled_attribute(attribute: ModuleAttribute, original: nn.Module, twin: nn.Module) -> ModuleAttribute:
    """A count is the same in both models; a width is scaled as it is between the models."""
    old, new = (_value(model.get_submodule(attribute.module), attribute.attribute) for model in (original, twin))
    if old == new or not old:
        return attribute
    values = [value * Fraction(new, old) for value in attribute.values]
    if any(value.denominator > 1 for value in values):
        where = f"{attribute.module}.{attribute.attribute}"
        raise TwinError(f"{where} is {old}, in the twin {new}: {list(attribute.values)} do not scale")
    return replace(attribute, values=tuple(int(value) for value in values))


def _value(module: nn.Module, path: str) -> int:
    found: Any = module
    for step in path.split("."):
        found = getattr(found, step)
    return int(found)


def _scaled_stream(planned: SequenceParallel | None, modules: Mapping[str, nn.Module]) -> SequenceParallel | None:
    """The same in a model with fewer layers."""
    if planned is None:
        return None

    def held(patterns: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for pattern in patterns for name in expand(pattern) if name in modules)

    layers = held(planned.layers)
    end = layers[-1] if planned.end in {name for pattern in planned.layers for name in expand(pattern)} else planned.end
    return SequenceParallel(layers=layers, gather=held(planned.gather), scatter=held(planned.scatter), end=end)


def _scaled_module(module: PlannedModule, config: Mapping[str, Any], divisor: int) -> PlannedModule:
    return replace(
        module,
        inputs={name: _scaled_crossing(crossing, config, divisor) for name, crossing in module.inputs.items()},
        output=None if module.output is None else _scaled_crossing(module.output, config, divisor),
    )


def _scaled_crossing(crossing: Crossing, config: Mapping[str, Any], divisor: int) -> Crossing:
    """Features scale, heads and experts do not. A size counts features if every config key of that size is a width."""
    text = scale_config.language_model(config)
    if crossing.interval is not None:
        return replace(crossing, interval=_divided(crossing.interval, divisor))
    sizes = {key in scale_config.WIDTHS for key, value in scale_config.entries(text) if value == crossing.size}
    if crossing.operation != "split" or sizes != {True}:
        return crossing
    assert crossing.size is not None
    (size, _) = _divided((crossing.size, 0), divisor)
    intervals: Sequence[iv.Intervals] = [
        tuple(_divided(interval, divisor) for interval in rank) for rank in crossing.intervals
    ]
    return replace(crossing, size=size, intervals=tuple(intervals))


def _divided(interval: iv.Interval, divisor: int) -> iv.Interval:
    if interval[0] % divisor or interval[1] % divisor:
        raise TwinError(f"{list(interval)} cannot be divided by {divisor}")
    return interval[0] // divisor, interval[1] // divisor
