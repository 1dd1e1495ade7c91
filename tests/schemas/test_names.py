"""Folding names and expanding them again, in an order that people expect."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.schemas.errors import DocumentError
from autotp_plan.schemas.names import MAX_NAMES, expand, fold, natural_key, num_names, starred

COMPONENTS = st.one_of(
    st.integers(0, 12).map(str),
    st.sampled_from(["model", "w", "#", "007", "x1", "", "\u00b2", "\u0663", "-1", "9" * 30, "1e3"]),
)
NAMES = st.lists(COMPONENTS, min_size=1, max_size=4).map(".".join)


@given(st.sets(NAMES, max_size=40))
def test_fold_then_expand_gives_the_names_back(names: set[str]) -> None:
    patterns = fold(sorted(names))
    found = [name for pattern in patterns for name in expand(pattern)]
    assert len(found) == len(names)
    assert set(found) == names
    assert fold(sorted(names, reverse=True)) == patterns, "the order of the names does not matter"


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([f"layers.{n}.w" for n in range(32)], ["layers.{0..31}.w"]),
        (["layers.0.w", "layers.2.w", "layers.3.w", "layers.4.w"], ["layers.{0,2..4}.w"]),
        ([f"l.{n}.e.{m}.w" for n in range(2) for m in range(3)], ["l.{0..1}.e.{0..2}.w"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["l.0.e.1", "l.{0..1}.e.0"]),
        (["layers.7.w"], ["layers.7.w"]),
        (["w10", "w9"], ["w9", "w10"]),
        (["a.007.b", "a.008.b"], ["a.007.b", "a.008.b"]),
        ([], []),
    ],
)
def test_names_that_differ_in_numbers_fold_to_ranges(names: list[str], patterns: list[str]) -> None:
    assert fold(names) == patterns


def test_natural_order() -> None:
    names = ["b.1", "a.10.x", "a.9.x", "a.w", f"a.{'1' * 5000}", "a.100.x"]
    assert sorted(names, key=natural_key) == ["a.9.x", "a.10.x", "a.100.x", f"a.{'1' * 5000}", "a.w", "b.1"]


def test_expand_keeps_the_place_of_every_brace() -> None:
    assert expand("a.{0,2..3}.b.{5}.c") == ["a.0.b.5.c", "a.2.b.5.c", "a.3.b.5.c"]
    assert expand("plain") == ["plain"]
    assert expand("") == [""]


@pytest.mark.parametrize(
    "pattern",
    ["a.{}", "a.{x}", "a.{3..1}", "a.{1..}", "a.{1,}", "a.{1", "a}1", "a.{{1}}", "{1}{2", "a.{-1..2}", "a.{ 1 }",
     f"a.{{0..{MAX_NAMES}}}", "{0..999}{0..999}{0..9}", "{0..999999999}", "{" + "9" * 5000 + "}", "a.{\u0660..\u0663}"],
)  # fmt: skip
def test_bad_braces_are_refused(pattern: str) -> None:
    with pytest.raises(DocumentError) as caught:
        expand(pattern)
    assert caught.value.faults[0].what == "a name pattern cannot be expanded"
    assert caught.value.faults[0].where == pattern


def test_numbers_between_dots_become_stars() -> None:
    assert starred("model.layers.12.experts.0.w1.weight") == "model.layers.*.experts.*.w1.weight"
    assert starred("7") == "*" and starred("1.2") == "*.*"
    for name in ("a.007.b", "a.x1.b", "a.1x", "a.1234567890.b", "a.-1.b", "a.1\n.b", ""):
        assert starred(name) == name


@given(st.sets(NAMES, min_size=1, max_size=40))
def test_num_names_counts_without_expanding(names: set[str]) -> None:
    assert all(num_names(pattern) == len(expand(pattern)) for pattern in fold(names))
