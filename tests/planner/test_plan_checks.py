"""What can be wrong with a consistent plan: columns, rows and tied parameters that do not pair."""

from __future__ import annotations

import dataclasses

import pytest

from autotp_plan.planner import check_plan
from autotp_plan.planner.model.inventory import inventory_hash
from autotp_plan.planner.rules.partition import Sharding, partition, replicated
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan.document import ModelIdentity, Parameter, Plan, Style, Tie
from autotp_plan.schemas.plan.rule_ref import Origin, RuleRef

COLUMN = partition((12, 4), Sharding(dim=0, unit=2), 2)
FUSED = partition((24, 4), Sharding(dim=0, shape=(2, -1), unit=2), 2)
ROW = partition((4, 12), Sharding(dim=1, unit=2), 2)
NO_MATCH = "a row-parallel weight has no column-parallel output that is sharded the same way"
UNTAKEN = "the output is sharded, and no row-parallel layer consumes it"
UNLIKE = "the input of a row-parallel weight is not sharded as the column-parallel output that feeds it"


def plan_of(*parameters: tuple[str, Style, Layout], tied: tuple[Tie, ...] = (), gather: str = "") -> Plan:
    layouts = {f"layout {index}": layout for index, (_, _, layout) in enumerate(parameters)}
    return Plan(
        model=ModelIdentity(model_type=None, architecture=None, config=None, inventory=inventory_hash({})),
        tp_size=2,
        layouts=layouts,
        parameters=tuple(
            Parameter(
                name=name,
                layout=f"layout {index}",
                dtype="F32",
                style=style,
                rule=RuleRef(Origin.UNKNOWN, "r"),
                gather_output=name == gather,
            )
            for index, (name, style, _) in enumerate(parameters)
        ),
        tied=tied,
    )


def swapped(layout: Layout) -> Layout:
    """The same cut with the two ranks' parts exchanged."""
    return dataclasses.replace(layout, intervals=layout.intervals[::-1])


def found(plan: Plan) -> list[tuple[str, str]]:
    assert Plan.from_dict(plan.to_dict()) == plan, "the plan itself is consistent"
    return [(fault.where, fault.what) for fault in check_plan(plan)]


@pytest.mark.parametrize("prefix", ["", "model.layers.0.mlp."])
def test_columns_need_a_row_that_consumes_them(prefix: str) -> None:
    up, down = (f"{prefix}up.weight", "column", COLUMN), (f"{prefix}down.weight", "row", ROW)
    assert found(plan_of(up, down)) == []  # type: ignore[arg-type]
    assert found(plan_of((f"{prefix}gate_up.weight", "column", FUSED), down)) == []  # type: ignore[arg-type]
    assert found(plan_of(up)) == [(f"{prefix}up.weight (r)", UNTAKEN)]  # type: ignore[arg-type]
    assert found(plan_of(up, gather=f"{prefix}up.weight")) == []  # type: ignore[arg-type]
    nested = (f"{prefix}inner.up.weight", "column", COLUMN)
    assert found(plan_of(nested, down)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "row", "what"),
    [
        (COLUMN, swapped(ROW), UNLIKE),
        (swapped(COLUMN), ROW, UNLIKE),
        (partition((12, 4), Sharding(dim=0, unit=3), 2), ROW, NO_MATCH),
        (COLUMN, partition((4, 12), Sharding(dim=1, unit=6), 2), NO_MATCH),
        (partition((24, 4), Sharding(dim=0, unit=2), 2), ROW, NO_MATCH),
        (swapped(FUSED), ROW, UNLIKE),
    ],
)
def test_a_row_sharded_unlike_its_column_is_a_fault(column: Layout, row: Layout, what: str) -> None:
    plan = plan_of(("l.0.up.weight", "column", column), ("l.0.down.weight", "row", row))
    assert set(found(plan)) == {("l.0.down.weight (r)", what)}


def test_a_row_without_a_column() -> None:
    lone = ("l.0.down.weight", "row", ROW)
    assert found(plan_of(lone)) == [("l.0.down.weight (r)", NO_MATCH)]  # type: ignore[arg-type]
    kept = ("l.0.up.weight", "replicated", replicated((12, 4)))
    assert found(plan_of(kept, lone)) == [("l.0.down.weight (r)", NO_MATCH)]  # type: ignore[arg-type]
    gathered = ("l.0.up.weight", "column", COLUMN)
    plan = plan_of(gathered, lone, gather="l.0.up.weight")  # type: ignore[arg-type]
    assert found(plan) == [("l.0.down.weight (r)", NO_MATCH)], "a gathered output is whole"
    elsewhere = ("l.1.up.weight", "column", COLUMN)
    assert found(plan_of(elsewhere, lone)) == [  # type: ignore[arg-type]
        ("l.0.down.weight (r)", NO_MATCH),
        ("l.1.up.weight (r)", UNTAKEN),
    ]


def test_the_same_fault_in_ten_layers_is_one() -> None:
    """Also where the fault names the other weight of each layer."""
    plan = plan_of(("l.{0..9}.up.weight", "column", COLUMN), ("l.{0..9}.down.weight", "row", swapped(ROW)))
    (fault,) = check_plan(plan)
    assert (fault.code, fault.where) == ("row-unlike-column", "l.{0..9}.down.weight (r)")
    assert fault.got == "units 3..5 | 0..2 per rank; l.{0..9}.up.weight: 0..2 | 3..5"


def test_two_columns_unlike_one_row_are_two_faults() -> None:
    plan = plan_of(
        ("l.{0..2}.gate.weight", "column", COLUMN),
        ("l.{0..2}.up.weight", "column", COLUMN),
        ("l.{0..2}.down.weight", "row", swapped(ROW)),
    )
    assert [fault.got.split("; ")[1] for fault in check_plan(plan)] == [
        "l.{0..2}.gate.weight: 0..2 | 3..5",
        "l.{0..2}.up.weight: 0..2 | 3..5",
    ]


@pytest.mark.parametrize(
    ("style", "layout", "tied", "sound"),
    [
        ("vocab", COLUMN, "column", True), ("vocab", COLUMN, "vocab", True), ("vocab", COLUMN, "replicated", False),
        ("replicated", replicated((4, 4)), "replicated", True), ("replicated", replicated((4, 4)), "column", False),
        ("vocab", COLUMN, "row", False),
    ],
)  # fmt: skip
def test_tied_parameters_must_be_sharded_alike(style: Style, layout: Layout, tied: Style, sound: bool) -> None:
    plan = plan_of(
        ("embed.weight", style, layout),
        tied=(Tie(name="head.weight", to="embed.weight", style=tied, rule=RuleRef(Origin.UNKNOWN, "r")),),
    )
    what = "a tied parameter runs in styles that need different layouts"
    assert found(plan) == ([] if sound else [("head.weight", what)])
