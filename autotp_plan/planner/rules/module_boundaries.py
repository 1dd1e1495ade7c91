"""What modules need in addition to shards: attributes with rank-local counts, and collectives at inputs and outputs.

A module whose weights are all replicated keeps its attributes and its forward, and a preset does not set a value that
is the same without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from autotp_plan.planner.rules import partition as pt
from autotp_plan.planner.rules.matching import Decision, compile_pattern, matches
from autotp_plan.planner.rules.rule_set import RuleList
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.plan.entries import Crossing, PlannedModule
from autotp_plan.schemas.plan.rule_ref import RuleRef, Section
from autotp_plan.schemas.spec import AttributeSpec, CrossingSpec, ModuleSpec


def sharded_modules(decisions: Mapping[str, Decision]) -> dict[str, None]:
    """The modules that hold, at any depth, a layer around which activations stay sharded."""
    found: dict[str, None] = {}
    for name, decision in decisions.items():
        if decision.shards_activations:
            module = name
            while module:
                module = module.rpartition(".")[0]
                found[module] = None
    return found


def module_attributes(
    lists: Sequence[RuleList], decisions: Mapping[str, Decision], symbols: Symbols, tp_size: int, faults: FaultBook
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """`(module, attribute, value per rank)` for the modules that hold sharded weights.

    Args:
        lists: the rules, in order of precedence.
        decisions: how every parameter is sharded.
        symbols: what names in expressions mean.
        tp_size: number of TP ranks.
        faults: gets what is wrong in a rule.
    """
    sharded = sharded_modules(decisions)
    done: set[tuple[str, str]] = set()
    for rules in lists:
        for index, spec in enumerate(rules.attributes, 1):
            rule = rules.ref(index, Section.MODULE_ATTRIBUTES)
            if not _holds(spec, symbols, rule, faults):
                continue
            values, unsharded = (
                {key: _values(symbols, ranks, faults, rule, size) for key, size in spec.attributes.items()}
                for ranks in (tp_size, 1)
            )
            for module in _matched(spec, sharded, rules, rule, faults):
                for attribute, value in values.items():
                    if value is not None and (module, attribute) not in done:
                        done.add((module, attribute))
                        if not rules.trusted or set(value) != set(unsharded[attribute] or ()):
                            yield module, attribute, value


def planned_modules(
    lists: Sequence[RuleList],
    decisions: Mapping[str, Decision],
    symbols: Symbols,
    tp_size: int,
    faults: FaultBook,
) -> Iterator[tuple[str, PlannedModule]]:
    """`(module, collectives at its inputs and output)`; the latter without the module's name, so that layers are equal.

    A module counts when something in it is sharded. One that is replicated and passes its output on to sharded layers
    (the shared key of multi-head latent attention) counts when a layer next to it is sharded.

    Args and faults as for `module_attributes`.
    """
    sharded = sharded_modules(decisions)
    adjacent = {
        name.rpartition(".")[0]: None for name in decisions if name.rpartition(".")[0].rpartition(".")[0] in sharded
    }
    done: set[str] = set()
    for rules in lists:
        for index, spec in enumerate(rules.modules, 1):
            rule = rules.ref(index, Section.MODULES)
            if not _holds(spec, symbols, rule, faults):
                continue
            passes_on = spec.output is not None and spec.output.operation == "copy"
            planned = _planned(spec, symbols, tp_size, rule, faults)
            for module in _matched(spec, adjacent if passes_on else sharded, rules, rule, faults):
                if planned is not None and module not in done:
                    done.add(module)
                    _check_buffers(module, spec, decisions, rule, faults)
                    yield module, planned


def _check_buffers(
    module: str, spec: ModuleSpec, decisions: Mapping[str, Decision], rule: RuleRef, faults: FaultBook
) -> None:
    for buffer, parameter in spec.buffers.items():
        decision = decisions.get(f"{module}.{parameter}")
        if decision is None or decision.style == "replicated":
            faults.add(
                "buffer-of-nothing",
                "a buffer is to be sharded as a parameter that is not sharded",
                f"{module}.{buffer}",
                rule,
                got=f"{parameter}, {'which is replicated' if decision else 'which the module does not have'}",
                expected="a sharded parameter of the module, by its name in the module",
                next="correct the name, or leave the buffer out",
            )


def _planned(
    spec: ModuleSpec, symbols: Symbols, tp_size: int, rule: RuleRef, faults: FaultBook
) -> PlannedModule | None:
    try:
        return PlannedModule(
            module="",
            inputs={name: _crossing(crossing, symbols, tp_size) for name, crossing in spec.inputs.items()},
            output=None if spec.output is None else _crossing(spec.output, symbols, tp_size),
            mean_over_ranks=spec.mean_over_ranks,
            buffers=spec.buffers,
        )
    except SymbolError as error:
        _unresolved(rule, error, faults)
    except pt.PartitionError as error:
        faults.add(
            error.code, error.what, rule=rule, got=error.got, expected=error.expected, next="choose another tp_size"
        )
    return None


def _crossing(spec: CrossingSpec, symbols: Symbols, tp_size: int) -> Crossing:
    extra = {"tp_size": tp_size}
    if spec.operation == "split":
        assert spec.size is not None
        size, unit = symbols.resolve(spec.size, extra), symbols.resolve(spec.unit, extra)
        layout = pt.partition((size,), pt.Sharding(dim=0, unit=unit, indivisible="uneven"), tp_size)
        return Crossing(operation="split", dim=spec.dim, size=size, intervals=layout.intervals)
    interval = None
    if spec.interval is not None:
        interval = (symbols.resolve(spec.interval[0], extra), symbols.resolve(spec.interval[1], extra))
    return Crossing(operation=spec.operation, interval=interval)


def _holds(spec: AttributeSpec | ModuleSpec, symbols: Symbols, rule: RuleRef, faults: FaultBook) -> bool:
    try:
        return symbols.holds(spec.when)
    except SymbolError as error:
        _unresolved(rule, error, faults)
        return False


def _matched(
    spec: AttributeSpec | ModuleSpec, modules: Collection[str], rules: RuleList, rule: RuleRef, faults: FaultBook
) -> Iterator[str]:
    """The modules that a pattern of `spec` matches; a user's every pattern must match one."""
    for pattern in spec.patterns:
        compiled = compile_pattern(pattern, rule, faults)
        matched = [module for module in modules if compiled and matches(compiled, module, rule)]
        if compiled and not matched and not rules.trusted:
            faults.add(
                "module-pattern-without-match",
                "a pattern matches no module that holds sharded weights",
                rule=rule,
                got=pattern,
                expected="a module name, such as model.layers.0.self_attn",
                next="patterns of modules and module_attributes are matched against module names",
            )
        yield from matched


def _values(
    symbols: Symbols, tp_size: int, faults: FaultBook, rule: RuleRef, size: int | str
) -> tuple[int, ...] | None:
    """The value on each rank; None when it cannot be resolved."""
    try:
        return tuple(symbols.resolve(size, {"tp_size": tp_size, "tp_rank": rank}) for rank in range(tp_size))
    except SymbolError as error:
        _unresolved(rule, error, faults)
        return None


def _unresolved(rule: RuleRef, error: SymbolError, faults: FaultBook) -> None:
    faults.add(
        "unresolved-size",
        "a size cannot be resolved",
        rule=rule,
        got=str(error),
        expected="sizes that the model's config gives",
        next="correct the expression",
    )
