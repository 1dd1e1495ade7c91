"""Patterns of strangers: the answer of `re`, for every pattern, and never later than a moment."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp_plan.planner.rules.preset_files import preset_names, read_preset
from autotp_plan.planner.wrappers.wrapper import find_wrapper
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.untrusted import patterns
from autotp_plan.schemas.untrusted.patterns import BoundedPattern, SlowPatternError
from tests.helpers.paths import PACKAGE

LEAVES = [
    "a",
    "b",
    ".",
    r"\.",
    r"\d",
    "[ab]",
    "[^a]",
    r"\w",
    r"\b",
    r"\B",
    "$",
    "^",
    "1",
    r"\s",
    r"\Z",
    r"\W",
    "[a-c1]",
    r"[^\d]",
]
TEXTS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        inner.map("(?:{})*".format),
        inner.map("({})+?".format),
        inner.map("({}){{1,3}}".format),
        inner.map("(?:{})?".format),
        inner.map("(?:{}){{2,}}".format),
    ),
    max_leaves=8,
)


def automaton(pattern: str) -> list[tuple[bool, Any]]:
    """As `BoundedPattern` makes it of patterns with many ways."""
    return patterns._automata(BoundedPattern(pattern)._tree, re.compile(pattern).flags)


def answer(automata: list[tuple[bool, Any]], name: str) -> bool:
    return all(one.matches(name) is wanted for wanted, one in automata)


@settings(deadline=None, max_examples=300)
@given(pattern=TEXTS, ahead=st.sampled_from(["", "(?!a)", "(?=.*b)", "(?!.*1$)"]),
       names=st.lists(st.text("ab.1 \n_c", max_size=7), min_size=1, max_size=8))  # fmt: skip
def test_an_automaton_answers_as_re_does(pattern: str, ahead: str, names: list[str]) -> None:
    found = automaton(ahead + pattern)
    bounded = BoundedPattern(ahead + pattern)
    for name in names:
        expected = re.match(ahead + pattern, name) is not None
        assert answer(found, name) is expected
        assert bounded.match(name) is expected


def test_a_wrong_automaton_is_found() -> None:
    """The comparison above sees a `$` that stands at the very end alone."""
    (found,) = automaton("a$")
    assert found[1].matches("a\n") is (re.match("a$", "a\n") is not None) is True
    assert (re.match(r"a\Z", "a\n") is not None) is not found[1].matches("a\n")


def shipped_patterns() -> set[str]:
    found = set()
    for name in preset_names():
        preset = read_preset(name)
        for rules in (preset.layer_specs, preset.vocabulary_specs, preset.module_attributes, preset.modules):
            found |= {pattern for rule in rules for pattern in rule.patterns}
    wrapper = find_wrapper({"model_type": "llava", "text_config": {"model_type": "llama"}})
    return found | (set(wrapper.whole.patterns) if wrapper else set())


def published_names() -> list[str]:
    """A parameter of every entry of every plan that is shipped, and the modules that it is in."""
    plans = [Plan.read(path) for path in sorted((PACKAGE / "plans").glob("*/*tp4.json"))[:40]]
    names = {re.sub(r"\{(\d+)[^}]*\}", r"\1", entry.name) for plan in plans for entry in plan.parameters}
    return sorted({*names, *(name.rpartition(".")[0] for name in names)})


@pytest.mark.sweep
def test_every_pattern_that_is_shipped_means_what_it_meant() -> None:
    """On the names of the published models, with both engines; and none of them is slow."""
    names, found = published_names(), shipped_patterns()
    assert len(found) > 80 and len(names) > 200
    for pattern in found:
        compiled, automata, bounded = re.compile(pattern), automaton(pattern), BoundedPattern(pattern)
        for name in names:
            expected = compiled.match(name) is not None
            assert bounded.match(name) is expected is answer(automata, name), (pattern, name)


SLOW = [
    r"(([a-z_.0-9])+)+!$", r"(.*)*(.*)*(.*)*x$", r".*.*.*.*.*.*.*.*.*x$", r"(\w+\.?)+!", r"(?:a?){500}a{500}!",
    r"(?:(?:a|b)?){3000}x", "((a{1000}){1000}){1000}", r"(a|b)*\1!", r"(?i)(a+)+b", "[a-z]*" * 1000 + "!", r"(?:a|a)*$",
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", SLOW)
def test_a_slow_pattern_is_answered_or_refused(pattern: str) -> None:
    started = time.process_time()
    try:
        bounded = BoundedPattern(pattern)
        for name in ("model.layers.0.self_attn.q_proj.weight", "a" * 127, "a" * 5000):
            assert not bounded.match(name) or pattern == r"(?:a|a)*$"
    except SlowPatternError:
        pass
    assert time.process_time() - started < 10


def test_what_users_write_is_not_refused() -> None:
    for pattern in (r"(\w+\.)*lm_head\.weight$", r".*layers.*self_attn.*(q|k|v)_proj.*weight", r"(?!.*vision).*attn.*",
                    r"(?i:.*MLP).*up", r"(?P<l>\d+)\.(?P=l)$", r"(?<!a)b"):  # fmt: skip
        assert BoundedPattern(pattern).match("nothing of it") is False
    assert BoundedPattern(r"(\w+\.)*lm_head\.weight$").match("model.language.lm_head.weight")
    assert BoundedPattern(r"(?!.*vision).*attn.*").match("model.attn.q") and not BoundedPattern(
        r"(?!.*vision).*attn.*"
    ).match("vision.attn.q")
