"""The text of a rule in plan files is read and written in one place, and comes out as it went in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.schemas.plan.rule_ref import DEFAULT_RULE, NO_RULE, Origin, RuleRef, Section
from tests.helpers.paths import PLANS


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("preset llama #1", RuleRef(Origin.PRESET, "llama", 1)),
        ("preset llama vocabulary #2", RuleRef(Origin.PRESET, "llama", 2, Section.VOCABULARY)),
        ("preset phi3 modules #1", RuleRef(Origin.PRESET, "phi3", 1, Section.MODULES)),
        ("spec file #3", RuleRef(Origin.SPEC, "file", 3)),
        ("spec file 2 #3", RuleRef(Origin.SPEC, "file 2", 3)),
        ("spec of mine #12", RuleRef(Origin.SPEC, "of mine", 12)),
        ("ds-config #1", RuleRef(Origin.DS_CONFIG, "", 1)),
        ("default for 1-D", DEFAULT_RULE),
        ("tp_plan of transformers #4", RuleRef(Origin.TP_PLAN, "", 4)),
        ("inference #2", RuleRef(Origin.INFERENCE, "", 2)),
        ("inference vocabulary #1", RuleRef(Origin.INFERENCE, "", 1, Section.VOCABULARY)),
        ("", NO_RULE),
        ("someone else's", RuleRef(Origin.UNKNOWN, "someone else's")),
        ("preset llama #01", RuleRef(Origin.UNKNOWN, "preset llama #01")),
        ("preset two words #1", RuleRef(Origin.UNKNOWN, "preset two words #1")),
        ("ds-config x #1", RuleRef(Origin.UNKNOWN, "ds-config x #1")),
    ],
)
def test_texts(text: str, ref: RuleRef) -> None:
    assert RuleRef.from_value(text) == ref
    assert str(ref) == ref.to_value() == text


@given(st.one_of(st.text(), st.from_regex(r"(preset|spec|ds-config|default)[ a-z#0-9]*#[0-9]+", fullmatch=True)))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    assert str(RuleRef.from_value(text)) == text


def golden_rules() -> Iterator[str]:
    for path in sorted(PLANS.glob("*/tp*.json")):
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        yield from (entry["rule"] for entry in [*data["parameters"], *data.get("tied", ())])


def test_every_rule_of_the_golden_plans_is_known() -> None:
    found = set(golden_rules())
    assert len(found) > 50
    for text in found:
        assert RuleRef.from_value(text).origin in (Origin.PRESET, Origin.DEFAULT, Origin.INFERENCE), text
