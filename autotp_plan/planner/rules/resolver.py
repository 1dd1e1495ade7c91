"""Which rule decides each parameter, and the layout that follows.

Rule lists are asked in order of precedence; the first rule that matches decides. Every fault of the whole model is
collected; nothing is guessed: a weight that no rule decides is a fault, and so is a pattern that matches nothing. A
DeepSpeed config is read as DeepSpeed reads it (`deepspeed_rules`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from autotp_plan.planner.deepspeed.limits import num_kv_heads
from autotp_plan.planner.model.inventory import Inventory
from autotp_plan.planner.rules import partition as pt
from autotp_plan.planner.rules.deepspeed_rules import (
    REST,
    as_deepspeed_runs,
    is_deepspeeds,
    matching_rules,
    settle_ties,
    shadowed,
)
from autotp_plan.planner.rules.heads import describe_units
from autotp_plan.planner.rules.matching import (
    Decision,
    Rule,
    check_work,
    compile_rules,
    deciding_rule,
    pattern_for,
    unmatched_patterns,
)
from autotp_plan.planner.rules.preset_checks import (
    check_modules_sharded_together,
    check_style,
    merge_with_preset,
    misreads_fused_weight,
    settle_partial_gradients,
)
from autotp_plan.planner.rules.rule_set import RuleList
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import is_index
from autotp_plan.schemas.plan.entries import Style
from autotp_plan.schemas.plan.rule_ref import DEFAULT_RULE, RuleRef, Section
from autotp_plan.schemas.spec import PartitionType, Spec

_STYLES: Mapping[PartitionType, Style] = {
    "column": "column",
    "row": "row",
    "vocab": "vocab",
    "shard": "shard",
    "skip": "replicated",
}
UNDECIDED = "undecided-weight"
"""Code of the fault of a weight that no rule decides."""
MAX_SUGGESTED_TP = 1024


@dataclass(kw_only=True)
class Resolver:
    """Resolves every parameter of one inventory; `faults` collects what is wrong."""

    inventory: Inventory
    symbols: Symbols
    tp_size: int
    uneven: bool = False
    rest_stays_whole: bool = False
    heads: tuple[str, ...] = ()
    faults: FaultBook = field(default_factory=FaultBook)
    notes: list[str] = field(default_factory=list)
    _layouts: dict[tuple[RuleRef, Spec, tuple[int, ...]], Layout | None] = field(default_factory=dict)
    _applied: set[tuple[Spec, tuple[int, ...]]] = field(default_factory=set)
    _indivisible: list[tuple[str, RuleRef, str, pt.IndivisibleError]] = field(default_factory=list)

    def resolve(self, lists: Sequence[RuleList]) -> dict[str, Decision]:
        """A decision for every parameter and tied name that has one, in the inventory's order.

        Args:
            lists: the rules, in order of precedence.

        Returns:
            decisions by name; names that no rule decides are left out, and are faults.
        """
        compiled = [
            (rules, compile_rules(rules, self.inventory.model_type, self.symbols, self.faults)) for rules in lists
        ]
        deciding = [compiled_rules for rules, compiled_rules in compiled if rules.decides]
        names = [*self.inventory.parameters, *self.inventory.tied]
        check_work((rule for _, rules in compiled for rule in rules), len(names))
        other_head = self._other_head(compiled)
        for rules, compiled_rules in compiled:
            for unmatched in unmatched_patterns(compiled_rules, names) if rules.decides else ():
                if other_head and rules.trusted and rules.section is Section.VOCABULARY:
                    self.notes.append(f"{unmatched.rule} has nothing to decide: the head is {other_head}.")
                elif rules.may_match_nothing:
                    self.notes.append(str(unmatched))
                else:
                    unmatched.fault(self.faults)
        trusted = [rule for rules, compiled_rules in compiled if rules.trusted for rule in compiled_rules]
        matching = {
            name: matching_rules(name, len(self._shape(name)), self._is_bias_of_weight(name), deciding, trusted)
            for name in names
        }
        for at, compiled_rules in enumerate(deciding):
            if compiled_rules and is_deepspeeds(compiled_rules[0]):
                self.notes += shadowed(compiled_rules, {name: found[at] for name, found in matching.items()})
        decisions: dict[str, Decision] = {}
        for name in names:
            if self._is_bias_of_weight(name):
                continue
            decision = self._decide(name, deciding_rule(name, matching[name], self.faults), trusted)
            if decision is not None:
                decisions[name] = decision
        for name in filter(self._is_bias_of_weight, names):
            weight = name.removesuffix("bias") + "weight"
            if weight in decisions:
                rule = deciding_rule(name, matching[name], self.faults)
                found = self._decide(name, rule, trusted) if rule is not None and _is_shard(decisions[weight]) else None
                decisions[name] = found or self._bias(name, weight, decisions[weight], rule)
        self._report_indivisible()
        decisions = settle_ties(decisions, self.inventory.tied, self.notes)
        check_modules_sharded_together(decisions, trusted, self.faults)
        decisions = settle_partial_gradients(decisions, trusted, self.faults)
        return {name: decisions[name] for name in names if name in decisions}

    def _other_head(self, compiled: Sequence[tuple[RuleList, Sequence[Rule]]]) -> str | None:
        """A weight outside of the layers that a rule of the user's decides and the preset does not know."""
        trusted = [rule for rules, found in compiled if rules.trusted for rule in found]
        users = [rule for rules, found in compiled if not rules.trusted for rule in found]
        for name, info in self.inventory.parameters.items():
            in_layers = len(info.shape) < 2 or any(is_index(part) for part in name.split("."))
            decided, known = (any(rule.matches(name) for rule in rules) for rules in (users, trusted))
            if decided and not known and not in_layers:
                return name
        return None

    def optional(self, lists: Sequence[RuleList]) -> set[str]:
        """The parameters that an optional rule matches."""
        book = FaultBook()  # faults in rules are reported by `resolve`
        rules = [r for one in lists for r in compile_rules(one, self.inventory.model_type, self.symbols, book)]
        return {name for name in self.inventory.parameters if any(r.spec.optional and r.matches(name) for r in rules)}

    def _decide(self, name: str, rule: Rule | None, trusted: Sequence[Rule]) -> Decision | None:
        shape = self._shape(name)
        if rule is None and len(shape) <= 1:  # a preset knows what is special about it even where it does not decide
            rule = next((one for one in trusted if one.matches(name)), None)
        if rule is None and len(shape) > 1 and self.rest_stays_whole:
            rule = REST
        if rule is None:
            return self._by_default(name, shape)
        spec = rule.spec
        known = None if rule.trusted else next((other for other in trusted if other.matches(name)), None)
        if is_deepspeeds(rule):
            kv_heads = num_kv_heads(self.symbols.config) if known is None else 0
            spec = as_deepspeed_runs(
                spec, name, shape, heads=self.heads, num_kv_heads=kv_heads, tp_size=self.tp_size if known is None else 1
            )
        if known is not None:
            if spec.split_input and known.spec.gather_output and name in self.inventory.tied:
                self.notes.append(f"{name} is tied to the embedding, so {known.ref} shards both by vocabulary.")
                spec = known.spec
            spec = merge_with_preset(spec, known.spec)
            check_style(name, rule.ref, spec, known, self.faults)
        if spec.partition_type == "skip":
            return Decision(
                rule=rule.ref,
                style="replicated",
                layout=pt.replicated(shape),
                partial_gradient=spec.grad_allreduce or spec.add_once,
                add_once=spec.add_once,
            )
        if (
            known is not None
            and known.spec.partition_type == spec.partition_type
            and misreads_fused_weight(name, rule.ref, shape, spec, known, self._sharding, self.faults)
        ):
            return None
        layout = self._layout(name, rule.ref, spec, shape)
        if layout is None:
            return None
        return Decision(
            rule=rule.ref,
            style=_STYLES[spec.partition_type],
            layout=layout,
            gather_output=spec.gather_output,
            split_input=spec.split_input,
        )

    def _by_default(self, name: str, shape: tuple[int, ...]) -> Decision | None:
        """What happens to a parameter that no rule matches: a weight of two or more dimensions is a fault."""
        if len(shape) <= 1:
            return Decision(rule=DEFAULT_RULE, style="replicated", layout=pt.replicated(shape))
        self.faults.add(
            UNDECIDED,
            "no rule decides a weight",
            name,
            got=f"shape {list(shape)}",
            expected="a rule for every weight of two or more dimensions",
            next='add a rule: {"patterns": ["' + pattern_for(name) + '"], "partition_type": "skip"} replicates it '
            'on every rank; "column", "row" or "vocab" shards it',
        )
        return None

    def _layout(self, name: str, rule: RuleRef, spec: Spec, shape: tuple[int, ...]) -> Layout | None:
        key = (rule, spec, shape)
        if key in self._layouts and self._layouts[key] is not None:
            return self._layouts[key]
        layout = None
        try:
            layout = pt.partition(shape, self._sharding(spec), self.tp_size)
            self._applied.add((spec, shape))
        except SymbolError as error:
            self.faults.add(
                "unresolved-size",
                "a size cannot be resolved",
                name,
                rule,
                got=str(error),
                expected="sizes that the model's config gives",
                next="correct the rule's shape and unit",
            )
        except pt.IndivisibleError as error:
            self._applied.add((spec, shape))
            units = describe_units(spec, error.position, error.sub, self.symbols, self.tp_size)
            self._indivisible.append((name, rule, units, error))
        except pt.PartitionError as error:
            self.faults.add(
                error.code,
                error.what,
                name,
                rule,
                got=error.got,
                expected=error.expected,
                next="correct the rule",
            )
        self._layouts[key] = layout
        return layout

    def _sharding(self, spec: Spec, tp_size: int | None = None) -> pt.Sharding:
        """The rule with every size an integer. Raises SymbolError."""
        extra = {"tp_size": tp_size or self.tp_size}
        resolve = partial(self.symbols.resolve, extra=extra)
        shape = None
        if spec.shape is not None:
            shape = tuple(
                tuple(map(resolve, size)) if isinstance(size, tuple) else resolve(size) for size in spec.shape
            )
        unit = spec.unit if spec.unit is not None else 1
        return pt.Sharding(
            dim=spec.partition_dim if spec.partition_dim is not None else 1 if spec.partition_type == "row" else 0,
            shape=shape,
            unit=tuple(map(resolve, unit)) if isinstance(unit, tuple) else resolve(unit),
            indivisible=spec.indivisible,
            uneven=self.uneven,
        )

    def _bias(self, name: str, weight: str, decision: Decision, rule: Rule | None) -> Decision:
        """The bias of a weight: sharded where the weight's output is, replicated where it is not."""
        shape = self._shape(name)
        layout = pt.replicated(shape)
        if decision.style == "column":
            layout = pt.bias_layout(self._shape(weight), decision.layout)
            if math.prod(shape) != math.prod(layout.shape):
                self.faults.add(
                    "bias-size",
                    "a bias does not fit its weight",
                    name,
                    got=f"shape {list(shape)}",
                    expected=f"{math.prod(layout.shape)} values",
                    next="check the checkpoint",
                )
        style: Style = "column" if decision.style == "column" else "replicated"
        if rule is not None and (rule.spec.partition_type == "column") != (style == "column"):
            self.faults.add(
                "bias-style",
                "a rule shards a bias in another way than its weight",
                name,
                rule.ref,
                got=f"{rule.spec.partition_type}; the weight is {decision.style} by {decision.rule}",
                expected="one rule for both: a bias is sharded as the output of its weight is",
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
        otherwise = "; or allow unequal shares with --uneven" if self._fits(self.tp_size, uneven=True) else ""
        for name, rule, units, error in self._indivisible:
            self.faults.add(
                error.code,
                error.what,
                name,
                rule,
                got=f"{units} over {self.tp_size} ranks",
                expected=error.expected,
                next=f"TP sizes that work for the whole model: {works}{otherwise}",
            )

    def _fits(self, tp_size: int, uneven: bool = False) -> bool:
        """Whether every rule that was applied could be at `tp_size`."""
        try:
            shardings = [(shape, self._sharding(spec, tp_size)) for spec, shape in self._applied]
            if uneven:
                shardings = [(shape, dataclasses.replace(sharding, uneven=True)) for shape, sharding in shardings]
            return all(pt.tp_size_fits(shape, sharding, tp_size) for shape, sharding in shardings)
        except (SymbolError, pt.PartitionError):
            return False


def _is_shard(decision: Decision) -> bool:
    """Whether a weight is one of a module that keeps its forward, whose bias has a rule of its own."""
    return decision.style == "shard"
