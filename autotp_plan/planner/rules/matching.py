"""Matching rules and parameters: a spec with its reference and compiled patterns, and which rule decides a parameter.

The first rule list with a rule that matches decides. What a rule then does to a weight is not known here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from autotp_plan.planner.rules.rule_set import RuleList
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan.entries import Style
from autotp_plan.schemas.plan.rule_ref import Origin, RuleRef
from autotp_plan.schemas.spec import Spec
from autotp_plan.schemas.untrusted.patterns import BoundedPattern, SlowPatternError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule with its reference and compiled patterns."""

    ref: RuleRef
    spec: Spec
    patterns: tuple[BoundedPattern, ...]
    trusted: bool

    def matches(self, name: str) -> bool:
        """Whether a pattern matches the parameter `name` from its beginning, as DeepSpeed does."""
        return any(matches(pattern, name, self.ref) for pattern in self.patterns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """How one parameter (or tied name) is sharded, by which rule."""

    rule: RuleRef
    style: Style
    layout: Layout
    gather_output: bool = False
    partial_gradient: bool = False
    add_once: bool = False
    split_input: bool = False

    @property
    def shards_activations(self) -> bool:
        """Whether activations around this module stay sharded: not gathered after it, nor split before it."""
        return self.style in ("column", "row", "shard") and not self.gather_output and not self.split_input


def compile_rules(rules: RuleList, model_type: str | None, symbols: Symbols, faults: FaultBook) -> list[Rule]:
    """The rules of a list that hold for `model_type` and the model's config, their patterns compiled.

    Args:
        rules: the list, in the order in which its rules are numbered.
        model_type: the model's, as in config.json.
        symbols: what the names in conditions mean.
        faults: gets what is wrong in a rule itself.

    Raises:
        CompileError: there are too many patterns.
    """
    count = sum(len(spec.patterns) for spec in rules.specs)
    if count > MAX_PATTERNS:
        raise CompileError(_too_many_patterns(str(rules.ref(1)), f"{count} patterns", f"at most {MAX_PATTERNS}"))
    found = []
    of_model = (model_type or "").lower()
    for index, spec in enumerate(rules.specs, 1):
        if spec.model_types and of_model not in [wanted.lower() for wanted in spec.model_types]:
            continue
        ref = rules.ref(index)
        try:
            if not symbols.holds(spec.when):
                continue
        except SymbolError as error:
            faults.add(
                "undecidable-condition",
                "a condition cannot be decided",
                rule=ref,
                got=str(error),
                expected="config keys and symbols with not, and, or and comparisons",
                next="correct `when`, or give the key a default",
            )
            continue
        _check_keys(ref, spec, faults)
        compiled = [compile_pattern(pattern, ref, faults) for pattern in spec.patterns]
        patterns = tuple(pattern for pattern in compiled if pattern is not None)
        found.append(Rule(ref=ref, spec=spec, patterns=patterns, trusted=rules.trusted))
    return found


def compile_pattern(pattern: str, rule: RuleRef, faults: FaultBook) -> BoundedPattern | None:
    """The compiled pattern of `rule`; None, and a fault, when it is no regular expression."""
    try:
        return BoundedPattern(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        faults.add(
            "bad-pattern",
            "a pattern is not a regular expression",
            rule=rule,
            got=f"{pattern}: {error}",
            expected="a Python regular expression",
            next="escape dots and brackets with \\",
        )
    except SlowPatternError as error:
        fault = slow_pattern(pattern, rule, error)
        faults.add(fault.code, fault.what, rule=rule, got=fault.got, expected=fault.expected, next=fault.next)
    return None


def slow_pattern(pattern: str, rule: object, error: SlowPatternError) -> Fault:
    """The fault of a pattern that may take without end."""
    shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
    return Fault(
        code="slow-pattern",
        what="a pattern may take without end",
        where=str(rule),
        got=f"{shown}: {error}",
        expected="one that reads each character of a name once",
        next="write .* once for all that may stand between two words, as in .*\\.mlp\\.(up|gate)_proj\\.weight$",
    )


def matches(pattern: BoundedPattern, name: str, rule: object) -> bool:
    """Whether a pattern of a rule matches a name from its beginning. Raises CompileError: it takes too long."""
    try:
        return pattern.match(name)
    except SlowPatternError as error:
        raise CompileError(slow_pattern(pattern.pattern, rule, error)) from None


MAX_PATTERNS = 10_000
"""Of the rules of one file."""
MAX_WORK = 50_000_000
"""Names times patterns, in about a microsecond each."""


def check_work(rules: Iterable[Rule], num_names: int) -> None:
    """Raise CompileError where a user's patterns would take more than a minute on so many names."""
    found = [(pattern.weight, rule.ref) for rule in rules if not rule.trusted for pattern in rule.patterns]
    work = sum(weight for weight, _ in found) * num_names
    if work > MAX_WORK:
        got = f"{len(found)} patterns on {num_names} names"
        expected = f"at most {MAX_WORK} matches, and {MAX_WORK // 10} of patterns with several repeats"
        raise CompileError(_too_many_patterns(str(max(found, key=lambda one: one[0])[1]), got, expected))


def _too_many_patterns(where: str, got: str, expected: str) -> Fault:
    return Fault(
        code="too-many-patterns",
        what="there are too many patterns for so many parameters",
        where=where,
        got=got,
        expected=expected,
        next="join rules that say the same, and write .* once in a pattern",
    )


def _check_keys(rule: RuleRef, spec: Spec, faults: FaultBook) -> None:
    for wrong, expected in (
        (spec.gather_output and spec.partition_type != "column", "gather_output with column only"),
        (spec.grad_allreduce and spec.partition_type != "skip", "grad_allreduce with skip only"),
        (spec.split_input and spec.partition_type != "row", "split_input with row only"),
        (spec.add_once and spec.partition_type != "skip", "add_once with skip only"),
        (spec.partition_dim and spec.partition_type == "vocab", "partition_dim 0, the rows of the table"),
    ):
        if wrong:
            faults.add(
                "rule-contradicts-itself",
                "a rule contradicts itself",
                rule=rule,
                got=f"partition_type {spec.partition_type}",
                expected=expected,
                next="change the partition_type, or remove the other key",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmatched:
    """A pattern that matches no parameter, and what may be meant."""

    rule: RuleRef
    pattern: str
    hint: str

    def fault(self, faults: FaultBook) -> None:
        """Note it as a fault."""
        faults.add(
            "pattern-without-match",
            "a pattern matches no parameter",
            rule=self.rule,
            got=self.pattern,
            expected="at least one parameter of the model",
            next=self.hint,
        )

    def __str__(self) -> str:
        return f"{self.rule}: the pattern {self.pattern} matches no parameter, and has no effect; {self.hint}."


def unmatched_patterns(rules: Sequence[Rule], names: Sequence[str]) -> Iterator[Unmatched]:
    """Every pattern that is not optional and matches no parameter: a misunderstanding."""
    for rule in rules:
        if rule.spec.optional:
            continue
        for pattern in rule.patterns:
            if any(matches(pattern, name, rule.ref) for name in names):
                continue
            modules = {name.rpartition(".")[0] for name in names}
            if any(matches(pattern, module, rule.ref) for module in modules):
                fixed = pattern.pattern.rstrip("$") + "\\.weight$"
                hint = f"patterns are matched against parameter names, not modules: write {fixed}"
            elif rule.trusted:
                hint = "the checkpoint may be incomplete, or another architecture; see `--preset none --spec FILE`"
            else:
                hint = f'compare with the model\'s names, such as {_example(names)}; or mark the rule "optional": true'
            yield Unmatched(rule=rule.ref, pattern=pattern.pattern, hint=hint)


def deciding_rule(name: str, matching: Sequence[Sequence[Rule]], faults: FaultBook) -> Rule | None:
    """The rule that decides the parameter `name`: the first that matches, of the first list that has one.

    Args:
        name: the parameter's.
        matching: the rules of each list that match it, in order of precedence.
        faults: gets a fault where two rules of one list say different things; in a DeepSpeed config the first counts.
    """
    for found in matching:
        if not found:
            continue
        for other in found[1:]:
            if found[0].ref.origin is not Origin.DS_CONFIG and meaning(other.spec) != meaning(found[0].spec):
                faults.add(
                    "rules-disagree",
                    "two rules match one parameter and disagree",
                    name,
                    got=f"{found[0].ref} ({_brief(found[0].spec)}) and {other.ref} ({_brief(other.spec)})",
                    expected="one rule, or rules that say the same",
                    next="narrow one of the patterns",
                )
        return found[0]
    return None


def meaning(spec: Spec) -> Spec:
    """The rule without what does not change the layout."""
    return dataclasses.replace(spec, patterns=(), model_types=None, optional=False, when=None)


def _brief(spec: Spec) -> str:
    return spec.partition_type if spec.shape is None else f"{spec.partition_type}, shape {list(spec.shape)}"


def pattern_for(name: str) -> str:
    """A pattern for a parameter in every layer, as it is written in JSON."""
    parts = ["\\\\d+" if part.isdecimal() else part for part in name.split(".")]
    return "\\\\.".join(parts) + "$"


def _example(names: Sequence[str]) -> str:
    return next(
        (name for name in names if any(part.isdecimal() for part in name.split("."))), names[0] if names else ""
    )
