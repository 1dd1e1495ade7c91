"""Where two JSON values differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.planner.diff.json_values import MISSING, canonical, value_changes

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 1.0, "", "1", "a.b"]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "a.b", "0"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_no_change_is_found_exactly_between_equal_values(old: Any, new: Any) -> None:
    changes = list(value_changes(old, new))
    assert (not changes) == (canonical(old) == canonical(new))
    for _, before, after in changes:
        assert before is MISSING or after is MISSING or canonical(before) != canonical(after)


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), ("1", 1), (None, False), ({}, []), (0, -0.0)])
def test_values_that_python_takes_for_equal(old: Any, new: Any) -> None:
    assert list(value_changes({"a": old}, {"a": new})) == [(("a",), old, new)]


def test_items_of_a_list_of_objects_are_aligned() -> None:
    rules = [{"rule": number} for number in range(5)]
    assert list(value_changes(rules, [{"rule": 9}, *rules])) == [((0,), MISSING, {"rule": 9})]
    assert list(value_changes(rules, rules[:1] + rules[2:])) == [((1,), {"rule": 1}, MISSING)]
    assert list(value_changes(rules, [*rules[:4], {"rule": 7}])) == [((4, "rule"), 4, 7)]
    assert list(value_changes([1, 2, 3], [2, 3])) == [((0,), 1, 2), ((1,), 2, 3), ((2,), 3, MISSING)]


def test_depth_and_length_have_no_limit() -> None:
    deep: Any = 0
    for _ in range(900):
        deep = [deep]
    assert list(value_changes(deep, deep)) == []
    long = [{"rule": number} for number in range(3000)]
    assert len(list(value_changes(long, [*long[:1500], {"rule": -1}, *long[1500:]]))) == 1501
