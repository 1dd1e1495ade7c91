"""What can be wrong with a plan beyond its own consistency: how column-parallel, row-parallel and tied weights pair.

A row-parallel weight multiplies the output of column-parallel ones of its layer, so both must be sharded the same way:
in the same number of units, and the same units on each rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.names import is_index, parent_module
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter

_MOST_PAIRS = 100_000
"""Rows of one layout times the columns that feed them: more rows have the faults that the first have."""
_MOST_FAULTY_PAIRS = 10 * _MOST_PAIRS
"""Of all layouts: a plan with so many has enough to correct."""


def check_plan(plan: Plan) -> list[Fault]:
    """Faults in how a plan's modules fit together.

    Returns:
        what is wrong with pairs of column- and row-parallel weights, with parameters that one module computes with, and
        with ties; the same fault of many layers once. Empty when all fits.
    """
    book = FaultBook()
    columns: dict[str, list[Parameter]] = defaultdict(list)
    rows: list[Parameter] = []
    parameters = list(plan.expanded())
    for parameter in parameters:
        if len(plan.shape_of(parameter)) < 2:
            continue
        if parameter.style == "column" and not parameter.gather_output:
            columns[parent_module(parameter.name)].append(parameter)
        elif parameter.style == "row" and not parameter.split_input:
            rows.append(parameter)
    consumed: set[str] = set()
    feeders = _Feeders(columns)
    fitting = _FittingLayouts(plan)
    layouts: dict[int, tuple[str, ...]] = {}
    checked: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    faulty = 0
    for row in rows:
        feeding = feeders.of(row)
        if id(feeding) not in layouts:
            layouts[id(feeding)] = tuple(dict.fromkeys(column.layout for column in feeding))
            consumed.update(column.name for column in feeding)
        kind = (row.layout, layouts[id(feeding)])
        if fitting.fit(*kind):
            continue
        checked[kind] += len(feeding)
        if checked[kind] <= max(len(feeding), _MOST_PAIRS) and faulty < _MOST_FAULTY_PAIRS:
            faulty += len(feeding)
            _check_row(row, feeding, plan, book)
    for column in (column for inside in columns.values() for column in inside if column.name not in consumed):
        book.add(
            "unconsumed-column",
            "the output is sharded, and no row-parallel layer consumes it",
            column.name,
            column.rule,
            got="no row-parallel weight in its layer",
            expected="one that multiplies this output, or an output gathered on every rank",
            next='make the weight after it row-parallel, or say "gather_output": true',
        )
    _check_shards(parameters, plan, book)
    _check_ties(parameters, plan, book)
    return book.faults()


class _FittingLayouts:
    """Whether a row of one layout fits the columns of others: asked once for each kind of layer, not for each layer."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[tuple[str, tuple[str, ...]], bool] = {}

    def fit(self, row: str, columns: tuple[str, ...]) -> bool:
        """Whether `_check_row` finds nothing in a row of the layout `row` that columns of the others feed."""
        if (row, columns) not in self._known:
            self._known[row, columns] = self._fit(row, columns)
        return self._known[row, columns]

    def _fit(self, row: str, columns: tuple[str, ...]) -> bool:
        layout = self._plan.layouts[row]
        units = [_units(sub, start, layout) for sub, start in _sub_parameters(layout)]
        if len(units) != 1:
            return bool(columns)
        others = [
            _units(sub, start, self._plan.layouts[column])
            for column in columns
            for sub, start in _sub_parameters(self._plan.layouts[column])
            if sub.num_units == layout.sub_parameters[0].num_units
        ]
        return bool(others) and all(other == units[0] for other in others)


def _check_row(row: Parameter, feeding: Sequence[Parameter], plan: Plan, book: FaultBook) -> None:
    layout = plan.layouts[row.layout]
    row_units = [_units(sub, start, layout) for sub, start in _sub_parameters(layout)]
    comparable = 0
    for column in feeding:
        other = plan.layouts[column.layout]
        for sub, start in _sub_parameters(other):
            if len(row_units) == 1 and sub.num_units == layout.sub_parameters[0].num_units:
                comparable += 1
                if _units(sub, start, other) != row_units[0]:
                    column_units = _brief(_units(sub, start, other))
                    book.add(
                        "row-unlike-column",
                        "the input of a row-parallel weight is not sharded as the column-parallel output that feeds it",
                        row.name,
                        row.rule,
                        got=f"units {_brief(row_units[0])} per rank; {column.name}: {column_units}",
                        expected="the same units on each rank",
                        next="correct one of the two rules",
                        mentions=(column.name,),
                    )
    if (len(row_units) > 1 and feeding) or comparable:
        return
    names = ", ".join(
        f"{c.name} in {[s.num_units for s in plan.layouts[c.layout].sub_parameters]} units" for c in feeding
    )
    book.add(
        "row-without-column",
        "a row-parallel weight has no column-parallel output that is sharded the same way",
        row.name,
        row.rule,
        got=names or "no column-parallel weight in its layer",
        expected=f"one whose output is sharded in {[sub.num_units for sub in layout.sub_parameters]} units",
        next="make the weights before it column-parallel with the same unit, or replicate this one (skip)",
        mentions=tuple(column.name for column in feeding),
    )


def _check_shards(parameters: Sequence[Parameter], plan: Plan, book: FaultBook) -> None:
    """Parameters that one module computes with, such as fused experts: the same number of units, the same ranks."""
    inside: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.style == "shard":
            inside[parameter.name.rpartition(".")[0]].append(parameter)
    for members in inside.values():
        by_count: dict[int, tuple[Parameter, list[list[tuple[int, int]]]]] = {}
        for parameter in members:
            layout = plan.layouts[parameter.layout]
            for sub, start in _sub_parameters(layout):
                units = _units(sub, start, layout)
                first, expected = by_count.setdefault(sub.num_units, (parameter, units))
                if units != expected:
                    book.add(
                        "module-sharded-unevenly",
                        "two parameters of one module are sharded in different places",
                        parameter.name,
                        parameter.rule,
                        got=f"units {_brief(units)} per rank; {first.name}: {_brief(expected)}",
                        expected="the same units on each rank",
                        next="correct one of the two rules",
                        mentions=(first.name,),
                    )


class _Feeders:
    """The column-parallel weights by every module that they are in; `columns` are by the module around theirs."""

    def __init__(self, columns: dict[str, list[Parameter]]) -> None:
        self._inside: dict[str, list[Parameter]] = defaultdict(list)
        self._outside: list[Parameter] = []
        self._none: list[Parameter] = []
        for parent, inside in columns.items():
            module = parent
            while module:
                self._inside[module] += inside
                module = module.rpartition(".")[0]
            if not any(map(is_index, parent.split("."))):
                self._outside += inside

    def of(self, row: Parameter) -> list[Parameter]:
        """The weights of the nearest enclosing module that has any, inside the row's layer; one list for equal ones.

        For a row outside of all layers: those that are outside of all layers too.
        """
        module = parent_module(row.name)
        while module:
            found = self._inside.get(module, self._none)
            if found or is_index(module.rpartition(".")[2]):
                return found
            module = module.rpartition(".")[0]
        return self._outside


def _sub_parameters(layout: Layout) -> Iterator[tuple[SubParameter, int]]:
    start = 0
    for sub in layout.sub_parameters:
        yield sub, start
        start += sub.size


def _units(sub: SubParameter, start: int, layout: Layout) -> list[list[tuple[int, int]]]:
    """For each rank, the intervals of units of a sub-parameter that it holds."""
    held = []
    for intervals in layout.intervals:
        held_by_rank = []
        for first, last in intervals:
            first, last = max(first, start) - start, min(last, start + sub.size) - start
            if first < last:
                held_by_rank.append((first // sub.unit, last // sub.unit))
        held.append(held_by_rank)
    return held


def _brief(units: list[list[tuple[int, int]]]) -> str:
    shown = " | ".join(",".join(f"{start}..{stop - 1}" for start, stop in rank) or "none" for rank in units)
    return shown if len(shown) < 70 else shown[:67] + "..."


def _check_ties(parameters: Sequence[Parameter], plan: Plan, book: FaultBook) -> None:
    by_name = {parameter.name: parameter for parameter in parameters}
    for tie in plan.tied:
        style = by_name[tie.to].style
        if (tie.style == "replicated") != (style == "replicated") or "row" in (tie.style, style):
            book.add(
                "tied-styles",
                "a tied parameter runs in styles that need different layouts",
                tie.name,
                got=f"{tie.style} and {style}",
                expected="vocab and column, or replicated under both names",
                next="compile again",
            )
