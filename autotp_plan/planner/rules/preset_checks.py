"""Users' rules, and the decisions for all parameters, compared with what a preset knows about the architecture.

A user's rule may replicate what a preset shards, one module at a time. It may not run a weight in another style,
misread what is fused in it, or forget that a gradient is partial.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from autotp_plan.planner.rules import partition as pt
from autotp_plan.planner.rules.matching import Decision, Rule
from autotp_plan.planner.rules.symbols import SymbolError
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.names import fold, parent_module
from autotp_plan.schemas.plan.rule_ref import DEFAULT_RULE, REST_RULE, RuleRef
from autotp_plan.schemas.spec import Spec

_SAME_STYLE = {("row", "vocab"), ("column", "shard"), ("row", "shard")}
"""A user's and a preset's word for the same: DeepSpeed has one word for each of the two dimensions, and no more."""


def merge_with_preset(spec: Spec, known: Spec) -> Spec:
    """A user's rule, completed by what only the preset's rule for the same parameter knows.

    Args:
        spec: the user's rule.
        known: the preset's rule.

    Returns:
        the preset's rule where the user's says the same in DeepSpeed's words; else the user's, with the preset's unit
        if it has none and shards the same dimension, and with a partial gradient wherever one of the two says so.
    """
    if (spec.partition_type, known.partition_type) in _SAME_STYLE:
        spec = dataclasses.replace(known, patterns=spec.patterns)
    elif spec.unit is None and spec.partition_type == known.partition_type:
        spec = dataclasses.replace(spec, unit=known.unit)
    return dataclasses.replace(
        spec,
        grad_allreduce=spec.grad_allreduce or known.grad_allreduce,
        add_once=spec.add_once or known.add_once,
    )


def check_style(name: str, rule: RuleRef, spec: Spec, known: Rule, faults: FaultBook) -> None:
    """A user's rule may replicate what the preset shards, but not run it in another style.

    Args:
        name: the parameter's.
        rule: the user's rule.
        spec: what it says, after merging with the preset's.
        known: the preset's rule for the parameter.
        faults: gets a fault where the styles differ.
    """
    found, expected = ((one.partition_type, one.gather_output) for one in (spec, known.spec))
    row_head = spec.split_input and known.spec.gather_output
    if found == expected or spec.partition_type == "skip" or row_head:
        return
    faults.add(
        "style-of-another-module",
        "a rule runs a weight in a way that does not fit its module",
        name,
        rule,
        got=_style(found),
        expected=f"{_style(expected)}, as {known.ref} knows the weight; or skip",
        next="remove the rule: the preset has the right one",
    )


def misreads_fused_weight(
    name: str,
    rule: RuleRef,
    shape: tuple[int, ...],
    spec: Spec,
    known: Rule,
    resolve: Callable[[Spec], pt.Sharding],
    faults: FaultBook,
) -> bool:
    """Whether a user's rule takes other matrices to be fused in a weight than the preset's rule does; then a fault too.

    Args:
        name: the parameter's.
        rule: the user's rule.
        shape: the parameter's.
        spec: what the user's rule says.
        known: the preset's rule for the parameter.
        resolve: makes integers of a rule's sizes.
        faults: gets a fault where the sub-parameters differ.
    """
    try:
        found, right = (pt.partition(shape, dataclasses.replace(resolve(one), unit=1), 1) for one in (spec, known.spec))
    except (SymbolError, pt.PartitionError):
        return False  # then the rule is at fault when it is applied; or the config does not fit, and the preset's is
    got, expected = ([sub.size for sub in one.sub_parameters] for one in (found, right))
    if (found.shape, found.dim, got) == (right.shape, right.dim, expected):
        return False
    faults.add(
        "fused-weight-misread",
        "a rule splits a fused weight in the wrong place",
        name,
        rule,
        got=f"sub-parameters {got} along dim {found.dim} of {list(found.shape)}",
        expected=f"{expected} along dim {right.dim} of {list(right.shape)}, as {known.ref} knows the weight",
        next="remove the rule (the preset has the right one), or give it the shape that is expected",
    )
    return True


def check_modules_sharded_together(
    decisions: Mapping[str, Decision], trusted: Sequence[Rule], faults: FaultBook
) -> None:
    """What a preset shards in one module is sharded or replicated together: a head count cannot be both.

    Args:
        decisions: how every parameter is sharded.
        trusted: the preset's rules.
        faults: gets a fault for each weight that is replicated where others of its module are sharded.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in decisions:
        known = next((rule for rule in trusted if rule.matches(name)), None)
        if known and known.spec.partition_type in ("column", "row", "shard") and not known.spec.gather_output:
            groups[_module_of(name, known.spec.partition_type)].append(name)
    for names in groups.values():
        sharded = [name for name in names if decisions[name].style != "replicated"]
        for name in names:
            if sharded and decisions[name].style == "replicated":
                faults.add(
                    "replicated-among-sharded",
                    "a weight is replicated where the rest of its module is sharded",
                    name,
                    decisions[name].rule,
                    got=f"{', '.join(one.rpartition('.')[0].rpartition('.')[2] for one in sharded)} sharded",
                    expected="all of them sharded, or all of them replicated",
                    next='add a rule for it, or say "use_default_specs": true, and the preset decides what is left open'
                    if decisions[name].rule == REST_RULE
                    else "give the others the same kind of rule, or remove this one",
                )


def settle_partial_gradients(
    decisions: Mapping[str, Decision], trusted: Sequence[Rule], faults: FaultBook
) -> dict[str, Decision]:
    """The decisions with partial gradients only where activations are sharded.

    The gradient of a replicated parameter is the same on every rank elsewhere, and summed it would be tp_size times too
    large.

    Args:
        decisions: how every parameter is sharded.
        trusted: the preset's rules, whose partial gradients end where a user's rule replicates the module.
        faults: gets a fault for each partial gradient that a user's rule asks for elsewhere.
    """
    sharded = _modules_of_sharded_activations(decisions)
    settled = dict(decisions)
    for name, decision in decisions.items():
        if not decision.partial_gradient or parent_module(name) in sharded or name.rpartition(".")[0] in sharded:
            continue
        if any(rule.matches(name) and (rule.spec.grad_allreduce or rule.spec.add_once) for rule in trusted):
            settled[name] = dataclasses.replace(decision, partial_gradient=False, add_once=False)
            continue
        faults.add(
            "gradient-summed-twice",
            "a gradient is summed where every rank has all of it",
            name,
            decision.rule,
            got="grad_allreduce, and no weight of its module is sharded",
            expected="grad_allreduce only for parameters that act on sharded activations",
            next="remove grad_allreduce, or shard the weights of the module",
        )
    return settled


def undecided_among_sharded(
    decisions: Mapping[str, Decision], rules: Collection[RuleRef] = (DEFAULT_RULE,)
) -> list[str]:
    """The parameters that no rule decides, in modules whose weights are sharded: their gradients may be partial.

    Args:
        decisions: how every parameter is sharded.
        rules: what decides where no rule does.

    Returns:
        names, layers folded.
    """
    sharded = _modules_of_sharded_activations(decisions)
    return fold(name for name, one in decisions.items() if one.rule in rules and parent_module(name) in sharded)


def notes_on_gradients(names: Sequence[str]) -> list[str]:
    """A note on each of `names`, parameters among sharded weights that users' rules leave open."""
    return [
        f"{name} is whole on every rank, in a module whose weights are cut. If it acts on cut activations, as a norm "
        'of each head does, its gradient is partial: say "grad_allreduce": true in a skip rule.'
        for name in names
    ]


def refuse_undecided(names: Sequence[str], source: str, faults: FaultBook) -> None:
    """A fault for each of `names`: a preset has a rule for every parameter among the weights that it shards.

    Args:
        names: from `undecided_among_sharded`.
        source: what shards the weights, as `preset llama`.
        faults: gets the faults.
    """
    for name in names:
        faults.add(
            "unknown-to-preset",
            "the preset does not know a parameter among weights that are sharded",
            name,
            got=f"{source} has no rule for it",
            expected="to know whether it acts on sharded activations, and so has a partial gradient",
            next='decide it in a spec file: {"patterns": ["..."], "partition_type": "skip", "grad_allreduce": true}, '
            "or false; `autotp-plan verify` shows which is right",
        )


def _modules_of_sharded_activations(decisions: Mapping[str, Decision]) -> set[str]:
    """The modules that hold column- or row-parallel layers between which activations stay sharded."""
    return {_module_of(name, decision.style) for name, decision in decisions.items() if decision.shards_activations}


def _module_of(name: str, style: str) -> str:
    """The module inside which activations are sharded: that of the parameter's layer, or of a shard itself."""
    return name.rpartition(".")[0] if style == "shard" else parent_module(name)


def _style(partition: tuple[str, bool]) -> str:
    return partition[0] + (" with gather_output" if partition[1] else "")
