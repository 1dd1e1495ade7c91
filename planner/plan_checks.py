"""What can be wrong with a plan beyond its own consistency: how column-parallel, row-parallel and tied weights pair.

A row-parallel weight multiplies what a column-parallel one next to it put out, so both must be cut alike: in as many
units, and the same units on each rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.names import is_index, parent_module
from autotp_plan.schemas.plan.document import Parameter, Plan


def check_plan(plan: Plan) -> list[Fault]:
    """Faults in how a plan's modules fit together; empty when they do."""
    book = FaultBook()
    columns: dict[str, list[Parameter]] = defaultdict(list)
    rows: list[Parameter] = []
    for parameter in plan.expanded():
        if len(plan.shape_of(parameter)) < 2:
            continue
        if parameter.style == "column" and not parameter.gather_output:
            columns[parent_module(parameter.name)].append(parameter)
        elif parameter.style == "row" and not parameter.split_input:
            rows.append(parameter)
    taken: set[str] = set()
    for row in rows:
        feeding = _feeding(row, columns)
        taken.update(column.name for column in feeding)
        _check_row(row, feeding, plan, book)
    for column in (column for inside in columns.values() for column in inside if column.name not in taken):
        book.add(
            "a column-parallel output stays cut and no row-parallel weight takes it",
            f"{column.name} ({column.rule})",
            got="no row-parallel weight beside it",
            expected="one that multiplies this output, or the whole output on every rank",
            next='cut the weight after it by row, or say "gather_output": true',
        )
    _check_shards(plan, book)
    _check_ties(plan, book)
    return book.faults()


def _check_row(row: Parameter, feeding: Sequence[Parameter], plan: Plan, book: FaultBook) -> None:
    layout = plan.layouts[row.layout]
    own = [_units(sub, start, layout) for sub, start in _sub_parameters(layout)]
    comparable = 0
    for column in feeding:
        other = plan.layouts[column.layout]
        for sub, start in _sub_parameters(other):
            if len(own) == 1 and sub.num_units == layout.sub_parameters[0].num_units:
                comparable += 1
                if _units(sub, start, other) != own[0]:
                    book.add(
                        "a row-parallel input is cut unlike the column-parallel output that feeds it",
                        f"{row.name} ({row.rule})",
                        got=f"units {_brief(own[0])} per rank; {column.name}: {_brief(_units(sub, start, other))}",
                        expected="the same units on each rank",
                        next="correct one of the two rules",
                    )
    if (len(own) > 1 and feeding) or comparable:
        return
    names = ", ".join(
        f"{c.name} in {[s.num_units for s in plan.layouts[c.layout].sub_parameters]} units" for c in feeding
    )
    book.add(
        "a row-parallel weight has no column-parallel output that is cut like it",
        f"{row.name} ({row.rule})",
        got=names or "no column-parallel weight beside it",
        expected=f"one whose output is cut in {[sub.num_units for sub in layout.sub_parameters]} units",
        next="make the weights before it column-parallel with the same unit, or keep this one whole (skip)",
    )


def _check_shards(plan: Plan, book: FaultBook) -> None:
    """Parameters that one module computes with, such as fused experts: those cut in as many units are cut alike."""
    inside: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in plan.expanded():
        if parameter.style == "shard":
            inside[parameter.name.rpartition(".")[0]].append(parameter)
    for parameters in inside.values():
        by_count: dict[int, tuple[Parameter, list[list[tuple[int, int]]]]] = {}
        for parameter in parameters:
            layout = plan.layouts[parameter.layout]
            for sub, start in _sub_parameters(layout):
                units = _units(sub, start, layout)
                first, expected = by_count.setdefault(sub.num_units, (parameter, units))
                if units != expected:
                    book.add(
                        "two parameters of one module are cut in different places",
                        f"{parameter.name} ({parameter.rule})",
                        got=f"units {_brief(units)} per rank; {first.name}: {_brief(expected)}",
                        expected="the same units on each rank",
                        next="correct one of the two rules",
                    )


def _feeding(row: Parameter, columns: dict[str, list[Parameter]]) -> list[Parameter]:
    """The column-parallel weights of the nearest enclosing module that has any, inside the row's own layer.

    For a row outside of all layers: those that are outside of all layers too.
    """
    module = parent_module(row.name)
    while module:
        found = [p for parent, inside in columns.items() if f"{parent}.".startswith(f"{module}.") for p in inside]
        if found or is_index(module.rpartition(".")[2]):
            return found
        module = module.rpartition(".")[0]
    return [p for parent, inside in columns.items() if not any(map(is_index, parent.split("."))) for p in inside]


def _sub_parameters(layout: Layout) -> Iterator[tuple[SubParameter, int]]:
    start = 0
    for sub in layout.sub_parameters:
        yield sub, start
        start += sub.size


def _units(sub: SubParameter, start: int, layout: Layout) -> list[list[tuple[int, int]]]:
    """For each rank, the runs of units of a sub-parameter that it holds."""
    held = []
    for intervals in layout.intervals:
        runs = []
        for first, last in intervals:
            first, last = max(first, start) - start, min(last, start + sub.size) - start
            if first < last:
                runs.append((first // sub.unit, last // sub.unit))
        held.append(runs)
    return held


def _brief(units: list[list[tuple[int, int]]]) -> str:
    shown = " | ".join(",".join(f"{start}..{stop - 1}" for start, stop in runs) or "none" for runs in units)
    return shown if len(shown) < 70 else shown[:67] + "..."


def _check_ties(plan: Plan, book: FaultBook) -> None:
    by_name = {parameter.name: parameter for parameter in plan.expanded()}
    for tie in plan.tied:
        style = by_name[tie.to].style
        if (tie.style == "replicated") != (style == "replicated") or "row" in (tie.style, style):
            book.add(
                "a tied parameter runs in ways that need different cuts",
                tie.name,
                got=f"{tie.style} and {style}",
                expected="vocab and column, or replicated under both names",
                next="compile again",
            )
