"""In what a plan can contradict itself: each contradiction has a name, and one does not hide another."""

from __future__ import annotations

from collections import Counter
from typing import Any

from autotp_plan.schemas.codec import decode
from autotp_plan.schemas.plan.entries import PlanEntries
from autotp_plan.schemas.plan.validate import plan_faults


def parameter(name: str = "a.weight", layout: str = "sharded", style: str = "column", **rest: Any) -> dict[str, Any]:
    return {"name": name, "layout": layout, "dtype": "F32", "style": style, "rule": "r", **rest}


def codes(*parameters: dict[str, Any], tp_size: int = 2, **rest: Any) -> list[str]:
    """The codes of all faults of a plan with these entries."""
    layouts = {
        "sharded": {"shape": [4, 2], "dim": 0, "sub_parameters": [[4, 2]], "intervals": [[[0, 2]], [[2, 4]]]},
        "replicated": {"shape": [4, 2]},
    }
    data = {
        "model": {"model_type": None, "architecture": None, "config": None, "inventory": "sha256:0"},
        "tp_size": tp_size,
        "layouts": layouts,
        "parameters": list(parameters),
        **rest,
    }
    return sorted(fault.code for fault in plan_faults(decode(PlanEntries, data)))


def test_a_sound_plan_has_no_faults() -> None:
    assert codes(parameter()) == []


def test_each_contradiction_of_one_entry_is_told() -> None:
    wrong = parameter(shape=[7], style="replicated", gather_output=True, split_input=True, add_once=True)
    assert codes(wrong) == [
        "add-once-without-partial-gradient",
        "gather-without-column",
        "shape-not-of-layout",
        "split-without-row",
        "style-not-of-layout",
    ]
    assert codes(parameter(partial_gradient=True)) == ["partial-gradient-of-shard"]
    assert codes(parameter(layout="shard", source="b.{0..1}")) == ["disk-name-count", "unknown-layout"]


def test_names_on_disk() -> None:
    assert codes(parameter(source="b", sources={"names": ["c.*", "d"], "count": 3})) == [
        "source-and-sources",
        "sources-count",
        "sources-stars",
    ]
    assert codes(parameter(sources={"names": ["c.{0..2}.x", "d"]})) == ["disk-name-count"]


def test_a_name_that_cannot_be_expanded_hides_nothing() -> None:
    found = codes(
        parameter("a.{0..}"),
        parameter("b.weight", style="row", gather_output=True),
        parameter("b.weight"),
        ignored=["{"],
        module_attributes=[{"module": "m.{x}", "attribute": "n", "values": [1]}],
        tied=[{"name": "t", "to": "nobody", "style": "column", "rule": "r"}],
    )
    assert Counter(found) == {
        "bad-name-pattern": 3,
        "gather-without-column": 1,
        "parameter-twice": 1,
        "attribute-values": 1,
        "tied-to-nothing": 1,
    }


def test_too_many_names_hide_nothing_but_names() -> None:
    found = codes(
        parameter("a.{0..999999}.weight"),
        parameter("b.weight", style="row", gather_output=True),
        parameter("c.weight", sources={"names": ["c.*"], "count": 2_000_000}),
        modules=[{"module": "m", "output": {"operation": "split"}}],
    )
    assert found == [
        "gather-without-column",
        "module-collective",
        "sources-count",
        "too-many-parameters",
        "too-many-tensors",
    ]


def test_layouts_of_another_tp_size() -> None:
    assert set(codes(parameter(), tp_size=3)) == {"layout-intervals"}


def test_a_layout_of_more_elements_than_there_can_be() -> None:
    layouts = {"most": {"shape": [2**31, 2**31]}, "more": {"shape": [2**62, 2]}, "without_end": {"shape": [2**62] * 40}}
    assert codes(layouts=layouts) == ["layout-elements"] * 2
