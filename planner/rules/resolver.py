"""Which rule decides each parameter, and the layout that follows.

Sources are asked in order of precedence; the first rule that matches decides. Every fault of the whole model is
collected; nothing is guessed: a weight that no rule decides is a fault, and so is a pattern that matches nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from autotp_plan.planner.model.inventory import Inventory
from autotp_plan.planner.rules import partition as pt
from autotp_plan.planner.rules.matching import (
    DEFAULT,
    Decision,
    Rule,
    check_patterns_match,
    compile_rules,
    deciding_rule,
    pattern_for,
)
from autotp_plan.planner.rules.preset_checks import check_way, check_whole_modules, misreads, settle_partial_gradients
from autotp_plan.planner.rules.rule_set import Source
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan.document import Style
from autotp_plan.schemas.spec import PartitionType, Spec

_STYLES: Mapping[PartitionType, Style] = {
    "column": "column",
    "row": "row",
    "vocab": "vocab",
    "shard": "shard",
    "skip": "replicated",
}
_SAME_WAY = {("row", "vocab"), ("column", "shard"), ("row", "shard")}
"""DeepSpeed's word for what the preset calls another: it has one word each for the two directions of a cut."""
UNDECIDED = "no rule decides a weight"
MAX_SUGGESTED_TP = 1024


@dataclass(kw_only=True)
class Resolver:
    """Resolves every parameter of one inventory; `faults` collects what is wrong."""

    inventory: Inventory
    symbols: Symbols
    tp_size: int
    uneven: bool = False
    faults: FaultBook = field(default_factory=FaultBook)
    _layouts: dict[tuple[str, Spec, tuple[int, ...]], Layout | None] = field(default_factory=dict)
    _cuts: set[tuple[Spec, tuple[int, ...]]] = field(default_factory=set)
    _indivisible: list[tuple[str, pt.IndivisibleError]] = field(default_factory=list)

    def resolve(self, sources: Sequence[Source]) -> dict[str, Decision]:
        """A decision for every parameter and tied name that has one, in the inventory's order."""
        compiled = [
            (source, compile_rules(source, self.inventory.model_type, self.symbols, self.faults)) for source in sources
        ]
        rules = [source_rules for source, source_rules in compiled if source.decides]
        names = [*self.inventory.parameters, *self.inventory.tied]
        for source_rules in rules:
            check_patterns_match(source_rules, names, self.faults)
        trusted = [rule for source, source_rules in compiled if source.trusted for rule in source_rules]
        decisions: dict[str, Decision] = {}
        for name in names:
            if self._is_bias_of_weight(name):
                continue
            rule = deciding_rule(name, rules, self.faults)
            decision = self._decide(name, rule, trusted)
            if decision is not None:
                decisions[name] = decision
        for name in filter(self._is_bias_of_weight, names):
            weight = name.removesuffix("bias") + "weight"
            if weight in decisions:
                decisions[name] = self._bias(name, weight, decisions[weight], deciding_rule(name, rules, self.faults))
        self._report_indivisible()
        check_whole_modules(decisions, trusted, self.faults)
        decisions = settle_partial_gradients(decisions, trusted, self.faults)
        return {name: decisions[name] for name in names if name in decisions}

    def optional(self, sources: Sequence[Source]) -> set[str]:
        """The parameters that an optional rule matches."""
        book = FaultBook()  # faults in rules are told by `resolve`
        rules = [r for s in sources for r in compile_rules(s, self.inventory.model_type, self.symbols, book)]
        return {name for name in self.inventory.parameters if any(r.spec.optional and r.matches(name) for r in rules)}

    def _decide(self, name: str, rule: Rule | None, trusted: Sequence[Rule]) -> Decision | None:
        shape = self._shape(name)
        if rule is None and len(shape) <= 1:  # a preset knows what is special about it even where it does not decide
            rule = next((one for one in trusted if one.matches(name)), None)
        if rule is None:
            if len(shape) <= 1:
                return Decision(rule=DEFAULT, style="replicated", layout=pt.whole(shape))
            self.faults.add(
                UNDECIDED,
                name,
                got=f"shape {list(shape)}",
                expected="a rule for every weight of two or more dimensions",
                next='add a rule: {"patterns": ["' + pattern_for(name) + '"], "partition_type": "skip"} keeps it '
                'whole on every rank; "column", "row" or "vocab" cuts it',
            )
            return None
        known = None if rule.trusted else next((other for other in trusted if other.matches(name)), None)
        spec = rule.spec
        if known is not None and (spec.partition_type, known.spec.partition_type) in _SAME_WAY:
            spec = dataclasses.replace(known.spec, patterns=spec.patterns)
        elif known is not None and spec.unit is None and spec.partition_type == known.spec.partition_type:
            spec = dataclasses.replace(spec, unit=known.spec.unit)
        if known is not None:
            check_way(f"{name} ({rule.name})", spec, known, self.faults)
            spec = dataclasses.replace(
                spec,
                grad_allreduce=spec.grad_allreduce or known.spec.grad_allreduce,
                add_once=spec.add_once or known.spec.add_once,
            )
        if spec.partition_type == "skip":
            return Decision(
                rule=rule.name,
                style="replicated",
                layout=pt.whole(shape),
                partial_gradient=spec.grad_allreduce or spec.add_once,
                add_once=spec.add_once,
            )
        if (
            known is not None
            and known.spec.partition_type == spec.partition_type
            and misreads(f"{name} ({rule.name})", shape, spec, known, self._cut, self.faults)
        ):
            return None
        layout = self._layout(name, rule.name, spec, shape)
        if layout is None:
            return None
        return Decision(
            rule=rule.name,
            style=_STYLES[spec.partition_type],
            layout=layout,
            gather_output=spec.gather_output,
            split_input=spec.split_input,
        )

    def _layout(self, name: str, rule: str, spec: Spec, shape: tuple[int, ...]) -> Layout | None:
        key = (rule, spec, shape)
        if key in self._layouts and self._layouts[key] is not None:
            return self._layouts[key]
        layout = None
        try:
            layout = pt.partition(shape, self._cut(spec), self.tp_size)
            self._cuts.add((spec, shape))
        except SymbolError as error:
            self.faults.add(
                "a size cannot be resolved",
                f"{name} ({rule})",
                got=str(error),
                expected="sizes that the model's config gives",
                next="correct the rule's shape and unit",
            )
        except pt.IndivisibleError as error:
            self._cuts.add((spec, shape))
            self._indivisible.append((f"{name} ({rule})", error))
        except pt.PartitionError as error:
            self.faults.add(
                error.what, f"{name} ({rule})", got=error.got, expected=error.expected, next="correct the rule"
            )
        self._layouts[key] = layout
        return layout

    def _cut(self, spec: Spec, tp_size: int | None = None) -> pt.Cut:
        extra = {"tp_size": tp_size or self.tp_size}
        resolve = partial(self.symbols.resolve, extra=extra)
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
            uneven=self.uneven,
        )

    def _bias(self, name: str, weight: str, decision: Decision, own: Rule | None) -> Decision:
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
        return dataclasses.replace(decision, style=style, layout=layout, gather_output=False, split_input=False)

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
        sizes = [size for size in range(1, MAX_SUGGESTED_TP + 1) if self._fits(size)]
        works = ", ".join(map(str, sizes[:16])) + (", ..." if len(sizes) > 16 else "")
        for where, error in self._indivisible:
            self.faults.add(
                error.what,
                where,
                got=error.got,
                expected=error.expected,
                next=f"TP sizes that work for the whole model: {works}; or allow unequal shares with --uneven",
            )

    def _fits(self, tp_size: int) -> bool:
        """Whether every rule that cut something could do so at `tp_size`."""
        try:
            return all(pt.tp_size_fits(shape, self._cut(spec, tp_size), tp_size) for spec, shape in self._cuts)
        except (SymbolError, pt.PartitionError):
            return False
