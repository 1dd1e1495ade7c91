"""Modules that must know of the ranks: attributes that hold whole-model counts, and what crosses a module's border.

A module whose weights are all kept whole keeps its attributes and its forward, and a preset does not set a value that
is the same without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from autotp_plan.planner.rules import partition as pt
from autotp_plan.planner.rules.matching import Decision, compile_pattern
from autotp_plan.planner.rules.rule_set import Source
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.plan.document import Crossing, PlannedModule
from autotp_plan.schemas.spec import AttributeSpec, CrossingSpec, ModuleSpec


def cut_modules(decisions: Mapping[str, Decision]) -> dict[str, None]:
    """The modules that hold, at any depth, a parameter that is cut and whose output stays cut."""
    found: dict[str, None] = {}
    for name, decision in decisions.items():
        if decision.inside_cut:
            module = name
            while module:
                module = module.rpartition(".")[0]
                found[module] = None
    return found


def module_attributes(
    sources: Sequence[Source], decisions: Mapping[str, Decision], symbols: Symbols, tp_size: int, faults: FaultBook
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """`(module, attribute, value per rank)` for the modules of which a weight is cut."""
    cut = cut_modules(decisions)
    done: set[tuple[str, str]] = set()
    for source in sources:
        for index, spec in enumerate(source.attributes, 1):
            rule = f"{source.label} module_attributes #{index}"
            if not _holds(spec, symbols, rule, faults):
                continue
            values, unsharded = (
                {key: _values(symbols, ranks, faults, rule, size) for key, size in spec.attributes.items()}
                for ranks in (tp_size, 1)
            )
            for module in _matched(spec, cut, source, rule, faults):
                for attribute, value in values.items():
                    if value is not None and (module, attribute) not in done:
                        done.add((module, attribute))
                        if not source.trusted or set(value) != set(unsharded[attribute] or ()):
                            yield module, attribute, value


def planned_modules(
    sources: Sequence[Source],
    decisions: Mapping[str, Decision],
    symbols: Symbols,
    tp_size: int,
    faults: FaultBook,
) -> Iterator[tuple[str, PlannedModule]]:
    """`(module, what crosses its border)`; the module's name is left out of the latter, so that alike ones are equal.

    A module counts when something in it is cut; one that is whole itself but hands its output to cut neighbours (the
    shared key of multi-head latent attention) when something beside it is.
    """
    cut = cut_modules(decisions)
    beside = {name.rpartition(".")[0]: None for name in decisions if name.rpartition(".")[0].rpartition(".")[0] in cut}
    done: set[str] = set()
    for source in sources:
        for index, spec in enumerate(source.modules, 1):
            rule = f"{source.label} modules #{index}"
            if not _holds(spec, symbols, rule, faults):
                continue
            hands_on = spec.output is not None and spec.output.operation == "copy"
            planned = _planned(spec, symbols, tp_size, rule, faults)
            for module in _matched(spec, beside if hands_on else cut, source, rule, faults):
                if planned is not None and module not in done:
                    done.add(module)
                    yield module, planned


def _planned(spec: ModuleSpec, symbols: Symbols, tp_size: int, rule: str, faults: FaultBook) -> PlannedModule | None:
    try:
        return PlannedModule(
            module="",
            inputs={name: _crossing(crossing, symbols, tp_size) for name, crossing in spec.inputs.items()},
            output=None if spec.output is None else _crossing(spec.output, symbols, tp_size),
            mean_over_ranks=spec.mean_over_ranks,
        )
    except SymbolError as error:
        _unresolved(rule, error, faults)
    except pt.PartitionError as error:
        faults.add(error.what, rule, got=error.got, expected=error.expected, next="choose another tp_size")
    return None


def _crossing(spec: CrossingSpec, symbols: Symbols, tp_size: int) -> Crossing:
    extra = {"tp_size": tp_size}
    if spec.operation == "split":
        assert spec.size is not None
        size, unit = symbols.resolve(spec.size, extra), symbols.resolve(spec.unit, extra)
        layout = pt.partition((size,), pt.Cut(dim=0, unit=unit, indivisible="uneven"), tp_size)
        return Crossing(operation="split", dim=spec.dim, size=size, intervals=layout.intervals)
    interval = None
    if spec.interval is not None:
        interval = (symbols.resolve(spec.interval[0], extra), symbols.resolve(spec.interval[1], extra))
    return Crossing(operation=spec.operation, interval=interval)


def _holds(spec: AttributeSpec | ModuleSpec, symbols: Symbols, rule: str, faults: FaultBook) -> bool:
    try:
        return symbols.holds(spec.when)
    except SymbolError as error:
        _unresolved(rule, error, faults)
        return False


def _matched(
    spec: AttributeSpec | ModuleSpec, modules: Collection[str], source: Source, rule: str, faults: FaultBook
) -> Iterator[str]:
    """The modules that a pattern of `spec` matches; for rules of one's own every pattern must match one."""
    for pattern in spec.patterns:
        compiled = compile_pattern(pattern, rule, faults)
        matched = [module for module in modules if compiled and compiled.match(module)]
        if compiled and not matched and not source.trusted:
            faults.add(
                "a pattern matches no module of which a weight is cut",
                rule,
                got=pattern,
                expected="a module name, such as model.layers.0.self_attn",
                next="patterns of modules and module_attributes are matched against module names",
            )
        yield from matched


def _values(symbols: Symbols, tp_size: int, faults: FaultBook, rule: str, size: int | str) -> tuple[int, ...] | None:
    """The value on each rank; None when it cannot be resolved."""
    try:
        return tuple(symbols.resolve(size, {"tp_size": tp_size, "tp_rank": rank}) for rank in range(tp_size))
    except SymbolError as error:
        _unresolved(rule, error, faults)
        return None


def _unresolved(rule: str, error: SymbolError, faults: FaultBook) -> None:
    faults.add(
        "a size cannot be resolved",
        rule,
        got=str(error),
        expected="sizes that the model's config gives",
        next="correct the expression",
    )
