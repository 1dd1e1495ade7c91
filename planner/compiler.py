"""`compile_plan`: from a model and rules to a plan. Describe, resolve, fold; nothing is written here."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autotp_plan.planner.deepspeed.notes import noted
from autotp_plan.planner.deepspeed.read_config import TensorParallelSection
from autotp_plan.planner.fallback.prove import Prover, fallback_rules, proven
from autotp_plan.planner.model.inventory import Inventory, inventory_of_folder, inventory_of_module
from autotp_plan.planner.model.tensor_names import DiskNames
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.rules.matching import Decision
from autotp_plan.planner.rules.module_boundaries import module_attributes, planned_modules
from autotp_plan.planner.rules.preset_checks import notes_on_gradients, refuse_undecided, undecided_among_cut
from autotp_plan.planner.rules.resolver import UNDECIDED, Resolver
from autotp_plan.planner.rules.rule_set import AUTO, Rules, gather, preset_names
from autotp_plan.schemas.errors import AutoTPError, CompileError, Fault
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand, fold, is_index, natural_key, starred
from autotp_plan.schemas.plan.document import (
    MAX_TP_SIZE,
    ModuleAttribute,
    Parameter,
    Plan,
    PlannedModule,
    RuntimeOptions,
    Sources,
    Tie,
)
from autotp_plan.schemas.spec import SpecFile
from autotp_plan.schemas.storage.checkpoint import read_config


def compile_plan(
    model: Path | Any,
    *,
    tp_size: int | None = None,
    preset: str = AUTO,
    specs: Sequence[SpecFile] = (),
    uneven: bool = False,
    deepspeed: TensorParallelSection | None = None,
    prove: Prover | None = None,
) -> Plan:
    """The plan for `model` at `tp_size`.

    Args:
        model: a folder with safetensors files or a bare config.json, or a live `torch.nn.Module` (on meta is fine).
        tp_size: number of TP ranks; None takes `autotp_size` of `deepspeed`.
        preset: `auto` (by the config's model_type), `none`, or the name of a preset.
        specs: spec files, the first has the highest precedence.
        uneven: give ranks shares of unequal size where `tp_size` does not divide.
        deepspeed: the `tensor_parallel` section of a DeepSpeed config; its rules come after `specs`.
        prove: tries a plan on a twin (`autotp_plan.runtime.try_plan`); a model without a preset is planned by its own
            `tp_plan` only with it.

    Raises CompileError with every fault found; CheckpointError or DocumentError when the model cannot be read.
    """
    tp_size = _tp_size(tp_size, deepspeed)
    if isinstance(model, Path):
        config = read_config(model) if model.is_dir() else None
    else:
        config = inventory_of_module(model).config
    model_type = (config or {}).get("model_type")
    rules = gather(model_type if isinstance(model_type, str) else None, preset, specs, deepspeed)
    compile_by = partial(_compile, model, config, tp_size=tp_size, uneven=uneven, deepspeed=deepspeed)
    try:
        return compile_by(rules)
    except CompileError as error:
        if not rules.may_fall_back or not model_type or all(fault.what != UNDECIDED for fault in error.faults):
            raise
        try:
            found = fallback_rules(model, tp_size)
        except CompileError:
            if rules.files:  # then what these leave open is what the user must know
                raise error from None
            raise
        if found is None:
            raise
    where = str(model) if isinstance(model, Path) else type(model).__name__
    return proven(lambda fallback: compile_by(rules.with_fallback(fallback)), found, prove, where)


def _compile(
    model: Path | Any,
    config: Mapping[str, Any] | None,
    rules: Rules,
    *,
    tp_size: int,
    uneven: bool,
    deepspeed: TensorParallelSection | None,
) -> Plan:
    symbols = rules.symbols(config)
    num_layers = rules.num_layers(symbols)
    names = rules.disk_names(symbols, num_layers)
    inventory = inventory_of_folder(model, names) if isinstance(model, Path) else inventory_of_module(model, names)
    resolver = Resolver(inventory=inventory, symbols=symbols, tp_size=tp_size, uneven=uneven)
    if num_layers is not None:
        _check_layers(inventory, num_layers, resolver.faults, resolver.optional(rules.sources))
    decisions = resolver.resolve(rules.sources)
    _check_ties(inventory, decisions, resolver.faults)
    if rules.preset is not None and rules.preset.name in preset_names():
        refuse_undecided(undecided_among_cut(decisions), str(rules.preset.name), resolver.faults)
    attributes = list(module_attributes(rules.sources, decisions, symbols, tp_size, resolver.faults))
    modules = list(planned_modules(rules.sources, decisions, symbols, tp_size, resolver.faults))
    resolver.faults.raise_if_any(CompileError)
    plan = _plan(inventory, rules, names, decisions, attributes, modules, tp_size, deepspeed)
    if deepspeed is not None and deepspeed.partition_config is not None and rules.preset is not None:
        plan = noted(plan, str(rules.preset.name))
    faults = check_plan(plan)
    if faults:
        raise CompileError(faults)
    return plan


def _tp_size(tp_size: int | None, deepspeed: TensorParallelSection | None) -> int:
    configured = deepspeed.tp_size if deepspeed else None
    if tp_size is not None and configured is not None and tp_size != configured:
        raise CompileError(
            Fault(
                what="two different TP sizes are asked for",
                where="--tp",
                got=f"--tp {tp_size}, and autotp_size {configured} in the DeepSpeed config",
                expected="one TP size",
                next="leave out --tp, or change autotp_size",
            )
        )
    chosen = tp_size if tp_size is not None else configured
    if chosen is None or not 1 <= chosen <= MAX_TP_SIZE:
        raise CompileError(
            Fault(
                what="the TP size is missing" if chosen is None else "the TP size makes no sense",
                where="--tp",
                got="none" if chosen is None else str(chosen),
                expected=f"a positive integer, at most {MAX_TP_SIZE}",
                next="give --tp N, or autotp_size in the DeepSpeed config's tensor_parallel section",
            )
        )
    return chosen


def _check_layers(inventory: Inventory, num_layers: int, faults: FaultBook, optional: Collection[str]) -> None:
    """A preset says how many layers there are: none may be missing, and layers hold what their neighbours hold.

    What an optional rule decides may be in some layers only: a mixture of experts has dense layers too.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for name in inventory.parameters:
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None:
            found[".".join([*parts[:at], "{}", *parts[at + 1 :]])].add(int(parts[at]))
    for template, layers in found.items():
        missing = set(range(num_layers)) - layers
        if template.replace("{}", str(min(layers))) in optional:
            missing = set()
        for layer in sorted(missing):
            faults.add(
                "the model lacks a parameter that its other layers have",
                template.replace("{}", str(layer)),
                got=f"it in {len(layers)} of {num_layers} layers",
                expected="it in every layer",
                next="the checkpoint is incomplete, or config.json is another model's",
            )
        for layer in sorted(layers - set(range(num_layers))):
            faults.add(
                "the model has a layer too many",
                template.replace("{}", str(layer)),
                got=f"layer {layer}",
                expected=f"layers 0 to {num_layers - 1}, as config.json says",
                next="config.json is another model's, or the checkpoint holds more than the model",
            )


def _check_ties(inventory: Inventory, decisions: Mapping[str, Decision], faults: FaultBook) -> None:
    for name, target in inventory.tied.items():
        if name not in decisions or target not in decisions:
            continue  # undecided: already a fault
        one, other = decisions[name], decisions[target]
        if (one.layout.dim, one.layout.intervals) != (other.layout.dim, other.layout.intervals):
            faults.add(
                "two names of one tied parameter are cut differently",
                name,
                got=f"{one.layout.name} by {one.rule}; {target}: {other.layout.name} by {other.rule}",
                expected="the same cut under both names",
                next="give both names the same kind of rule (vocab and column by vocabulary, or skip)",
            )


def _plan(
    inventory: Inventory,
    rules: Rules,
    names: DiskNames,
    decisions: Mapping[str, Decision],
    attributes: Sequence[tuple[str, str, tuple[int, ...]]],
    modules: Sequence[tuple[str, PlannedModule]],
    tp_size: int,
    deepspeed: TensorParallelSection | None,
) -> Plan:
    layouts: dict[str, Layout] = {}
    layout_names: dict[Layout, str] = {}
    folded: dict[Parameter, list[str]] = defaultdict(list)
    for name, info in inventory.parameters.items():
        decision = decisions[name]
        entry = Parameter(
            name="",
            layout=_layout_name(decision.layout, layouts, layout_names),
            dtype=info.dtype,
            style=decision.style,
            rule=decision.rule,
            shape=info.shape if info.shape != decision.layout.shape else None,
            gather_output=decision.gather_output,
            partial_gradient=decision.partial_gradient,
            add_once=decision.add_once,
            split_input=decision.split_input,
            source=None if info.source is None else starred(info.source),
            sources=_sources_template(info.sources),
        )
        folded[entry].append(name)
    parameters = [
        dataclasses.replace(
            entry, name=pattern, source=_source(pattern, inventory), sources=_sources(pattern, inventory)
        )
        for entry, alike in folded.items()
        for pattern in fold(alike)
    ]
    parameters.sort(key=lambda entry: natural_key(expand(entry.name)[0]))
    by_value: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for module, attribute, values in attributes:
        by_value[attribute, values].append(module)
    alike: list[tuple[PlannedModule, list[str]]] = []
    for module, planned in modules:
        same = next((names for other, names in alike if other == planned), None)
        if same is None:
            alike.append((planned, [module]))
        else:
            same.append(module)
    return Plan(
        model=inventory.identity(),
        tp_size=tp_size,
        layouts=dict(sorted(layouts.items(), key=lambda item: natural_key(item[0]))),
        parameters=tuple(parameters),
        module_attributes=tuple(
            ModuleAttribute(module=module, attribute=attribute, values=values)
            for (attribute, values), modules in sorted(by_value.items())
            for module in fold(modules)
        ),
        modules=tuple(
            dataclasses.replace(planned, module=pattern) for planned, members in alike for pattern in fold(members)
        ),
        tied=tuple(
            Tie(
                name=name,
                to=to,
                style=decisions[name].style,
                rule=decisions[name].rule,
                gather_output=decisions[name].gather_output,
            )
            for name, to in sorted(inventory.tied.items())
        ),
        ignored=(*names.ignored, *sorted(disk for disk, name in names.renamed.items() if name in inventory.tied)),
        runtime=RuntimeOptions(
            dtype=deepspeed.dtype if deepspeed else None,
            tp_overlap_comm=deepspeed.tp_overlap_comm if deepspeed else False,
        ),
        notes=(*rules.notes, *inventory.notes, *notes_on_gradients(undecided_among_cut(decisions))),
    )


def _layout_name(layout: Layout, layouts: dict[str, Layout], names: dict[Layout, str]) -> str:
    if layout not in names:
        name, count = layout.name, 1
        while name in layouts:
            count += 1
            name = f"{layout.name} #{count}"
        names[layout] = name
        layouts[name] = layout
    return names[layout]


def _sources_template(sources: Sources | None) -> Sources | None:
    return None if sources is None else dataclasses.replace(sources, names=tuple(map(starred, sources.names)))


def _source(pattern: str, inventory: Inventory) -> str | None:
    """The name on disk of the parameters that `pattern` stands for, its braces in step with the pattern's."""
    sources = [inventory.parameters[name].source for name in expand(pattern)]
    known = [source for source in sources if source is not None]
    assert len(known) in (0, len(sources)), "parameters of one entry have alike names on disk"
    return _in_step(pattern, known) if known else None


def _sources(pattern: str, inventory: Inventory) -> Sources | None:
    """The names on disk that each of the parameters that `pattern` stands for is made of, braces in step."""
    every = [inventory.parameters[name].sources for name in expand(pattern)]
    known = [sources for sources in every if sources is not None]
    assert len(known) in (0, len(every)), "parameters of one entry have alike names on disk"
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
            what="names on disk do not follow the names of the parameters",
            where=pattern,
            got=", ".join(folded[:3]),
            expected="numbers in the same order on both sides",
            next="name the tensors alike, or report this architecture",
        )
    )
