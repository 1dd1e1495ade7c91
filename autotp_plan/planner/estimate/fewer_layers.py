"""A plan of the first few layers of a model: what a step of all layers takes follows from it where layers repeat."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotp_plan.huggingface.scale_config import LAYERS, num_layers, per_layer
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan

_LAYER = re.compile(r"^((?:[^.]+\.)*?)(0|[1-9]\d*)\.(.+)$")
"""A name in the layers: what is before the number, the number, and the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeating:
    """How a model's layers repeat.

    Attributes:
        fewer: a number of first layers that has each kind, and the kinds in the order of all of them at its end.
        period: layers after which the kinds come again.
        times: how often the period is repeated in all layers, beyond the first `fewer`.
    """

    fewer: int
    period: int
    times: int


def repeating(plan: Plan) -> Repeating | None:
    """How the layers of the plan's model repeat; None where they do not, or too seldom to be worth it."""
    config = plan.model.config or {}
    depth = num_layers(config)
    if depth is None:
        return None
    lists, found = _lists_of_layers(plan, depth), defaultdict(list)
    for parameter in plan.expanded():
        layer = _LAYER.match(parameter.name)
        if layer is not None and layer[1] in lists:
            found[int(layer[2])].append((layer[3], parameter.layout, parameter.dtype, parameter.style))
    if not found:
        return None
    kinds = [(tuple(found[number]), per_layer(config, number)) for number in range(depth)]
    for period in range(1, depth // 4 + 1):
        start = depth - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        fewer = start + period + (depth - start) % period
        if fewer + 2 * period <= depth // 2:
            return Repeating(fewer=fewer, period=period, times=(depth - fewer) // period)
    return None


def of_first_layers(plan: Plan, layers: int) -> Plan:
    """The plan of a model that has the first `layers` of the plan's layers, and all that is around them.

    Args:
        plan: of a transformers model whose config says how many layers it has.
        layers: from 1 to as many.
    """
    config = plan.model.config or {}
    depth = num_layers(config) or layers

    lists = _lists_of_layers(plan, depth)

    def kept(name: str) -> bool:
        layer = _LAYER.match(name)
        return layer is None or layer[1] not in lists or int(layer[2]) < layers

    modules = (dataclasses.replace(entry, module=name) for entry in plan.modules for name in expand(entry.module))
    attributes = (
        dataclasses.replace(entry, module=name) for entry in plan.module_attributes for name in expand(entry.module)
    )
    ties = (
        dataclasses.replace(entry, name=name, to=to)
        for entry in plan.tied
        for name, to in zip(expand(entry.name), expand(entry.to), strict=True)
    )
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, config=_config_of(config, depth, layers)),
        parameters=tuple(
            dataclasses.replace(one, source=None, sources=None) for one in plan.expanded() if kept(one.name)
        ),
        modules=tuple(one for one in modules if kept(f"{one.module}.*")),
        module_attributes=tuple(one for one in attributes if kept(f"{one.module}.*")),
        tied=tuple(one for one in ties if kept(one.name)),
        ignored=(),
        rules=None,
        verified=None,
    )


def _lists_of_layers(plan: Plan, depth: int) -> set[str]:
    """What is before the number in the names of all layers: `model.layers.`; not that of a vision tower's."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for parameter in plan.expanded():
        layer = _LAYER.match(parameter.name)
        if layer is not None:
            numbers[layer[1]].add(int(layer[2]))
    return {before for before, found in numbers.items() if found == set(range(depth))}


def _config_of(config: Mapping[str, Any], depth: int, layers: int) -> dict[str, Any]:
    """The config with its first layers; lists that have an entry for each layer become shorter, too."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: changed(inner, item) for inner, item in value.items()}
        if isinstance(value, list) and len(value) == depth:
            return value[:layers]
        return layers if key in LAYERS and value == depth else value

    return {key: changed(key, value) for key, value in config.items()}
