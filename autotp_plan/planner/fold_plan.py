"""From decisions for single names to a plan's entries: what is the same in every layer becomes one entry.

`model.layers.{0..31}.mlp.up_proj.weight` stands for 32 parameters with one layout, one rule and names on disk that
count in step.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from autotp_plan.planner.model.inventory import Inventory
from autotp_plan.planner.rules.matching import Decision
from autotp_plan.planner.rules.resolution import Resolution
from autotp_plan.schemas.errors import AutoTPError, Fault
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand, fold, natural_key, starred
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import ModuleAttribute, Parameter, PlannedModule, Sources, Tie


def fold_plan(inventory: Inventory, resolution: Resolution, tp_size: int) -> Plan:
    """The plan of a model, without notes, ignored tensors and runtime options.

    Args:
        inventory: the model.
        resolution: what was decided for each of its names.
        tp_size: number of TP ranks.

    Raises:
        AutoTPError: the names on disk of parameters that fold into one entry do not.
    """
    layouts = _named(resolution.decisions[name].layout for name in inventory.parameters)
    by_layout = {layout: name for name, layout in layouts.items()}
    parameters = sorted(
        _fold_parameters(inventory, resolution.decisions, by_layout),
        key=lambda entry: natural_key(expand(entry.name)[0]),
    )
    return Plan(
        model=inventory.identity(),
        tp_size=tp_size,
        layouts=dict(sorted(layouts.items(), key=lambda item: natural_key(item[0]))),
        parameters=tuple(parameters),
        module_attributes=tuple(_fold_attributes(resolution.attributes)),
        modules=tuple(_fold_modules(resolution.modules)),
        tied=tuple(_tie(name, to, resolution.decisions[name]) for name, to in sorted(inventory.tied.items())),
    )


def _named(layouts: Iterable[Layout]) -> dict[str, Layout]:
    """Each different layout once, by a name that no other has."""
    found: dict[str, Layout] = {}
    for layout in dict.fromkeys(layouts):
        name, count = layout.name, 1
        while name in found:
            count += 1
            name = f"{layout.name} #{count}"
        found[name] = layout
    return found


def _fold_parameters(
    inventory: Inventory, decisions: Mapping[str, Decision], layout_names: Mapping[Layout, str]
) -> Iterator[Parameter]:
    names: dict[Parameter, list[str]] = defaultdict(list)
    for name, info in inventory.parameters.items():
        decision = decisions[name]
        entry = Parameter(
            name="",
            layout=layout_names[decision.layout],
            dtype=info.dtype,
            style=decision.style,
            rule=decision.rule,
            shape=info.shape if info.shape != decision.layout.shape else None,
            gather_output=decision.gather_output,
            partial_gradient=decision.partial_gradient,
            add_once=decision.add_once,
            split_input=decision.split_input,
            source=None if info.source is None else starred(info.source),
            sources=_starred(info.sources),
            transposed=info.transposed,
        )
        names[entry].append(name)
    for entry, same in names.items():
        for pattern in fold(same):
            source, sources = _source(pattern, inventory), _sources(pattern, inventory)
            yield dataclasses.replace(entry, name=pattern, source=source, sources=sources)


def _fold_attributes(attributes: Iterable[tuple[str, str, tuple[int, ...]]]) -> Iterator[ModuleAttribute]:
    modules: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for module, attribute, values in attributes:
        modules[attribute, values].append(module)
    for (attribute, values), same in sorted(modules.items()):
        for pattern in fold(same):
            yield ModuleAttribute(module=pattern, attribute=attribute, values=values)


def _fold_modules(modules: Iterable[tuple[str, PlannedModule]]) -> Iterator[PlannedModule]:
    groups: list[tuple[PlannedModule, list[str]]] = []  # a list: a PlannedModule holds a dict and has no hash
    for module, planned in modules:
        same = next((names for other, names in groups if other == planned), None)
        if same is None:
            groups.append((planned, [module]))
        else:
            same.append(module)
    for planned, names in groups:
        for pattern in fold(names):
            yield dataclasses.replace(planned, module=pattern)


def _tie(name: str, to: str, decision: Decision) -> Tie:
    return Tie(name=name, to=to, style=decision.style, rule=decision.rule, gather_output=decision.gather_output)


def _starred(sources: Sources | None) -> Sources | None:
    return None if sources is None else dataclasses.replace(sources, names=tuple(map(starred, sources.names)))


def _source(pattern: str, inventory: Inventory) -> str | None:
    """The name on disk of the parameters that `pattern` stands for, its braces in step with the pattern's."""
    sources = [inventory.parameters[name].source for name in expand(pattern)]
    known = [source for source in sources if source is not None]
    assert len(known) in (0, len(sources)), "parameters of one entry either all have other names on disk, or none"
    return _in_step(pattern, known) if known else None


def _sources(pattern: str, inventory: Inventory) -> Sources | None:
    """The names on disk that each of the parameters that `pattern` stands for is made of, braces in step."""
    every = [inventory.parameters[name].sources for name in expand(pattern)]
    known = [sources for sources in every if sources is not None]
    assert len(known) in (0, len(every)), "parameters of one entry are either all made of several tensors, or none"
    if not known:
        return None
    columns = zip(*(sources.names for sources in known))
    return dataclasses.replace(known[0], names=tuple(_in_step(pattern, list(column)) for column in columns))


def _in_step(pattern: str, names: Sequence[str]) -> str:
    """The pattern that expands to `names` in their order."""
    folded = fold(names)
    if len(folded) == 1 and expand(folded[0]) == names:
        return folded[0]
    raise AutoTPError(
        Fault(
            code="names-out-of-step",
            what="names on disk do not follow the names of the parameters",
            where=pattern,
            got=", ".join(folded[:3]),
            expected="numbers in the same order on both sides",
            next="name the tensors in the same order, or report this architecture",
        )
    )
