"""Which rule decides each parameter, and the layout that follows.

Sources are asked in order of precedence; the first rule that matches decides. Every fault of the whole model is
collected; nothing is guessed: a weight that no rule decides is a fault, and so is a pattern that matches nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autotp_plan.planner import partition as pt
from autotp_plan.planner.faults import FaultBook
from autotp_plan.planner.inventory import Inventory
from autotp_plan.planner.sources import Source
from autotp_plan.planner.symbols import SymbolError, Symbols
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan import MAX_TP_SIZE, Style
from autotp_plan.schemas.spec import Indivisible, PartitionType, Spec

_STYLES: Mapping[PartitionType, Style] = {"column": "column", "row": "row", "vocab": "vocab", "skip": "replicated"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """How one parameter (or tied name) is cut, by which rule."""

    rule: str
    style: Style
    layout: Layout
    gather_output: bool = False
    partial_gradient: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """A rule with its name and compiled patterns."""

    name: str
    spec: Spec
    patterns: tuple[re.Pattern[str], ...]
    trusted: bool

    def matches(self, name: str) -> bool:
        return any(pattern.match(name) for pattern in self.patterns)


@dataclass(kw_only=True)
class Resolver:
    """Resolves every parameter of one inventory; `faults` collects what is wrong."""

    inventory: Inventory
    symbols: Symbols
    tp_size: int
    faults: FaultBook = field(default_factory=FaultBook)
    _layouts: dict[tuple[str, Spec, tuple[int, ...]], Layout | None] = field(default_factory=dict)
    _tp_limits: set[tuple[int, Indivisible]] = field(default_factory=set)
    _indivisible: list[tuple[str, pt.IndivisibleError]] = field(default_factory=list)

    def resolve(self, sources: Sequence[Source]) -> dict[str, Decision]:
        """A decision for every parameter and tied name that has one, in the inventory's order."""
        compiled = [(source, self._compile(source)) for source in sources]
        rules = [source_rules for source, source_rules in compiled if source.decides]
        names = [*self.inventory.parameters, *self.inventory.tied]
        for source_rules in rules:
            self._check_patterns_match(source_rules, names)
        trusted = [rule for source, source_rules in compiled if source.trusted for rule in source_rules]
        decisions: dict[str, Decision] = {}
        for name in names:
            if self._is_bias_of_weight(name):
                continue
            rule = self._deciding_rule(name, rules)
            decision = self._decide(name, rule, trusted)
            if decision is not None:
                decisions[name] = decision
        for name in filter(self._is_bias_of_weight, names):
            weight = name.removesuffix("bias") + "weight"
            if weight in decisions:
                decisions[name] = self._bias(name, weight, decisions[weight], self._deciding_rule(name, rules))
        self._report_indivisible()
        return {name: decisions[name] for name in names if name in decisions}

    def _compile(self, source: Source) -> list[_Rule]:
        rules = []
        model_type = (self.inventory.model_type or "").lower()
        for index, spec in enumerate(source.specs, 1):
            if spec.model_types and model_type not in [wanted.lower() for wanted in spec.model_types]:
                continue
            name = f"{source.label} #{index}"
            self._check_words(name, spec)
            patterns = []
            for pattern in spec.patterns:
                try:
                    patterns.append(re.compile(pattern))
                except (re.error, OverflowError, RecursionError) as error:
                    self.faults.add(
                        "a pattern is not a regular expression",
                        name,
                        got=f"{pattern}: {error}",
                        expected="a Python regular expression",
                        next="escape dots and brackets with \\",
                    )
            rules.append(_Rule(name=name, spec=spec, patterns=tuple(patterns), trusted=source.trusted))
        return rules

    def _check_words(self, rule: str, spec: Spec) -> None:
        for wrong, words in (
            (spec.gather_output and spec.partition_type != "column", "gather_output with column only"),
            (spec.grad_allreduce and spec.partition_type != "skip", "grad_allreduce with skip only"),
            (spec.partition_dim and spec.partition_type == "vocab", "partition_dim 0, the rows of the table"),
        ):
            if wrong:
                self.faults.add(
                    "a rule contradicts itself",
                    rule,
                    got=f"partition_type {spec.partition_type}",
                    expected=words,
                    next="change the partition_type, or remove the other key",
                )

    def _check_patterns_match(self, rules: Sequence[_Rule], names: Sequence[str]) -> None:
        for rule in rules:
            if rule.spec.optional:
                continue
            for pattern in rule.patterns:
                if any(pattern.match(name) for name in names):
                    continue
                modules = {name.rpartition(".")[0] for name in names}
                if any(pattern.match(module) for module in modules):
                    fixed = pattern.pattern.rstrip("$") + "\\.weight$"
                    hint = f"patterns are matched against parameter names, not modules: write {fixed}"
                elif rule.trusted:
                    hint = "the checkpoint may be incomplete, or another architecture; see `--preset none --spec FILE`"
                else:
                    hint = (
                        f'compare with the model\'s names, such as {_example(names)}; or mark the rule "optional": true'
                    )
                self.faults.add(
                    "a pattern matches no parameter",
                    rule.name,
                    got=pattern.pattern,
                    expected="at least one parameter of the model",
                    next=hint,
                )

    def _deciding_rule(self, name: str, rules: Sequence[Sequence[_Rule]]) -> _Rule | None:
        for source_rules in rules:
            found = [rule for rule in source_rules if rule.matches(name)]
            if not found:
                continue
            for other in found[1:]:
                if _meaning(other.spec) != _meaning(found[0].spec):
                    self.faults.add(
                        "two rules match one parameter and disagree",
                        name,
                        got=f"{found[0].name} ({_brief(found[0].spec)}) and {other.name} ({_brief(other.spec)})",
                        expected="one rule, or rules that say the same",
                        next="narrow one of the patterns",
                    )
            return found[0]
        return None

    def _decide(self, name: str, rule: _Rule | None, trusted: Sequence[_Rule]) -> Decision | None:
        shape = self._shape(name)
        if rule is None:
            if len(shape) <= 1:
                return Decision(rule="default: at most one dimension", style="replicated", layout=pt.whole(shape))
            self.faults.add(
                "no rule decides a weight",
                name,
                got=f"shape {list(shape)}",
                expected="a rule for every weight of two or more dimensions",
                next='add a rule: {"patterns": ["' + _pattern_for(name) + '"], "partition_type": "skip"} keeps it '
                'whole on every rank; "column", "row" or "vocab" cuts it',
            )
            return None
        known = None if rule.trusted else next((other for other in trusted if other.matches(name)), None)
        spec = rule.spec
        if known is not None and spec.partition_type == "row" and known.spec.partition_type == "vocab":
            spec = dataclasses.replace(known.spec, patterns=spec.patterns)
        elif known is not None and spec.unit is None and spec.partition_type == known.spec.partition_type:
            spec = dataclasses.replace(spec, unit=known.spec.unit)
        if spec.partition_type == "skip":
            return Decision(
                rule=rule.name, style="replicated", layout=pt.whole(shape), partial_gradient=spec.grad_allreduce
            )
        if (
            known is not None
            and known.spec.partition_type == spec.partition_type
            and self._misreads(f"{name} ({rule.name})", shape, spec, known)
        ):
            return None
        layout = self._layout(name, rule.name, spec, shape)
        if layout is None:
            return None
        return Decision(
            rule=rule.name, style=_STYLES[spec.partition_type], layout=layout, gather_output=spec.gather_output
        )

    def _layout(self, name: str, rule: str, spec: Spec, shape: tuple[int, ...]) -> Layout | None:
        key = (rule, spec, shape)
        if key in self._layouts and self._layouts[key] is not None:
            return self._layouts[key]
        layout = None
        try:
            cut = self._cut(spec)
            self._tp_limits.update(
                (sub.num_units, cut.indivisible) for sub in pt.partition(shape, cut, 1).sub_parameters
            )
            layout = pt.partition(shape, cut, self.tp_size)
        except SymbolError as error:
            self.faults.add(
                "a size cannot be resolved",
                f"{name} ({rule})",
                got=str(error),
                expected="sizes that the model's config gives",
                next="correct the rule's shape and unit",
            )
        except pt.IndivisibleError as error:
            self._indivisible.append((f"{name} ({rule})", error))
        except pt.PartitionError as error:
            self.faults.add(
                error.what, f"{name} ({rule})", got=error.got, expected=error.expected, next="correct the rule"
            )
        self._layouts[key] = layout
        return layout

    def _cut(self, spec: Spec) -> pt.Cut:
        resolve = self.symbols.resolve
        shape = None
        if spec.shape is not None:
            shape = tuple(
                tuple(map(resolve, size)) if isinstance(size, tuple) else resolve(size) for size in spec.shape
            )
        unit = spec.unit if spec.unit is not None else 1
        return pt.Cut(
            dim=spec.partition_dim if spec.partition_dim is not None else 1 if spec.partition_type == "row" else 0,
            shape=shape,
            unit=tuple(map(resolve, unit)) if isinstance(unit, tuple) else resolve(unit),
            indivisible=spec.indivisible,
        )

    def _misreads(self, where: str, shape: tuple[int, ...], spec: Spec, known: _Rule) -> bool:
        """A user's rule may choose whether and by what to cut, but not misread what is fused in a weight."""
        try:
            own, truth = (
                pt.partition(shape, dataclasses.replace(self._cut(one), unit=1), 1) for one in (spec, known.spec)
            )
        except (SymbolError, pt.PartitionError):
            return False  # the user's rule says so itself; or the config does not fit, and then the preset's does
        got, expected = ([sub.size for sub in one.sub_parameters] for one in (own, truth))
        if (own.shape, own.dim, got) == (truth.shape, truth.dim, expected):
            return False
        self.faults.add(
            "a rule cuts a fused weight in the wrong place",
            where,
            got=f"sub-parameters {got} along dim {own.dim} of {list(own.shape)}",
            expected=f"{expected} along dim {truth.dim} of {list(truth.shape)}, as {known.name} knows the weight",
            next="remove the rule (the preset has the right one), or give it the shape that is expected",
        )
        return True

    def _bias(self, name: str, weight: str, decision: Decision, own: _Rule | None) -> Decision:
        """The bias of a weight goes with it: cut where the weight's output is, whole otherwise."""
        shape = self._shape(name)
        layout = pt.whole(shape)
        if decision.style == "column":
            layout = pt.bias_layout(self._shape(weight), decision.layout)
            if math.prod(shape) != math.prod(layout.shape):
                self.faults.add(
                    "a bias does not fit its weight",
                    name,
                    got=f"shape {list(shape)}",
                    expected=f"{math.prod(layout.shape)} values",
                    next="check the checkpoint",
                )
        style: Style = "column" if decision.style == "column" else "replicated"
        if own is not None and (own.spec.partition_type == "column") != (style == "column"):
            self.faults.add(
                "a rule cuts a bias unlike its weight",
                f"{name} ({own.name})",
                got=f"{own.spec.partition_type}; the weight is {decision.style} by {decision.rule}",
                expected="one rule for both: a bias is cut with the output of its weight",
                next="narrow the pattern to weights; biases follow by themselves",
            )
        return dataclasses.replace(decision, style=style, layout=layout, gather_output=False)

    def _is_bias_of_weight(self, name: str) -> bool:
        if not name.endswith(".bias") or len(self._shape(name)) != 1:
            return False
        weight = name.removesuffix("bias") + "weight"
        known = weight in self.inventory.parameters or weight in self.inventory.tied
        return known and len(self._shape(weight)) > 1

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.inventory.parameters[self.inventory.tied.get(name, name)].shape

    def _report_indivisible(self) -> None:
        """Indivisible sizes, once all are known: with the TP sizes that would work for every rule."""
        if not self._indivisible:
            return
        sizes = [
            size
            for size in range(1, min(max((count for count, _ in self._tp_limits), default=1), MAX_TP_SIZE) + 1)
            if all(size <= count and (how == "uneven" or count % size == 0) for count, how in self._tp_limits)
        ]
        works = ", ".join(map(str, sizes[:16])) + (", ..." if len(sizes) > 16 else "")
        for where, error in self._indivisible:
            self.faults.add(
                error.what,
                where,
                got=error.got,
                expected=error.expected,
                next=f'TP sizes that work for the whole model: {works}; or say "indivisible": "uneven" in the rule',
            )


def module_attributes(
    sources: Sequence[Source], decisions: Mapping[str, Decision], resolver: Resolver
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
            values = {attribute: _values(resolver, rule, size) for attribute, size in spec.attributes.items()}
            for pattern in spec.patterns:
                matched = [module for module in cut_modules if _full_match(resolver, rule, pattern, module)]
                if not matched and not source.trusted:
                    resolver.faults.add(
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
                            yield module, attribute, value


def _full_match(resolver: Resolver, rule: str, pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        resolver.faults.add(
            "a pattern is not a regular expression",
            rule,
            got=f"{pattern}: {error}",
            expected="a Python regular expression",
            next="escape dots and brackets with \\",
        )
        return False


def _values(resolver: Resolver, rule: str, size: int | str) -> tuple[int, ...] | None:
    try:
        return tuple(
            resolver.symbols.resolve(size, {"tp_size": resolver.tp_size, "tp_rank": rank})
            for rank in range(resolver.tp_size)
        )
    except SymbolError as error:
        resolver.faults.add(
            "a size cannot be resolved",
            rule,
            got=str(error),
            expected="sizes that the model's config gives",
            next="correct the expression",
        )
        return None


def _meaning(spec: Spec) -> Spec:
    """The rule without what does not change the cut."""
    return dataclasses.replace(spec, patterns=(), model_types=None, optional=False)


def _brief(spec: Spec) -> str:
    return spec.partition_type if spec.shape is None else f"{spec.partition_type}, shape {list(spec.shape)}"


def _pattern_for(name: str) -> str:
    parts = ["\\\\d+" if part.isdecimal() else part for part in name.split(".")]
    return "\\\\.".join(parts) + "$"


def _example(names: Sequence[str]) -> str:
    return next(
        (name for name in names if any(part.isdecimal() for part in name.split("."))), names[0] if names else ""
    )
