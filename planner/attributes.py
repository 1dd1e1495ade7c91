"""Attributes of modules that hold whole-model counts and must become local on each rank.

A module whose weights are all kept whole keeps its attributes too, and a preset does not set a value that is the same
without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from autotp_plan.planner.faults import FaultBook
from autotp_plan.planner.rules import Decision, compile_pattern
from autotp_plan.planner.sources import Source
from autotp_plan.planner.symbols import SymbolError, Symbols


def module_attributes(
    sources: Sequence[Source], decisions: Mapping[str, Decision], symbols: Symbols, tp_size: int, faults: FaultBook
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """`(module, attribute, value per rank)` for the modules of which a weight is cut."""
    cut_modules: dict[str, None] = {}
    for name, decision in decisions.items():
        if decision.style in ("column", "row") and not decision.gather_output:
            module = name
            while module:
                module = module.rpartition(".")[0]
                cut_modules[module] = None
    done: set[tuple[str, str]] = set()
    for source in sources:
        for index, spec in enumerate(source.attributes, 1):
            rule = f"{source.label} module_attributes #{index}"
            values, unsharded = (
                {key: _values(symbols, ranks, faults, rule, size) for key, size in spec.attributes.items()}
                for ranks in (tp_size, 1)
            )
            for pattern in spec.patterns:
                compiled = compile_pattern(pattern, rule, faults)
                matched = [module for module in cut_modules if compiled and compiled.match(module)]
                if compiled and not matched and not source.trusted:
                    faults.add(
                        "a pattern matches no module of which a weight is cut",
                        rule,
                        got=pattern,
                        expected="a module name, such as model.layers.0.self_attn",
                        next="patterns of module_attributes are matched against module names",
                    )
                for module in matched:
                    for attribute, value in values.items():
                        if value is not None and (module, attribute) not in done:
                            done.add((module, attribute))
                            if not source.trusted or set(value) != set(unsharded[attribute] or ()):
                                yield module, attribute, value


def _values(symbols: Symbols, tp_size: int, faults: FaultBook, rule: str, size: int | str) -> tuple[int, ...] | None:
    """The value on each rank; None when it cannot be resolved."""
    try:
        return tuple(symbols.resolve(size, {"tp_size": tp_size, "tp_rank": rank}) for rank in range(tp_size))
    except SymbolError as error:
        faults.add(
            "a size cannot be resolved",
            rule,
            got=str(error),
            expected="sizes that the model's config gives",
            next="correct the expression",
        )
        return None
