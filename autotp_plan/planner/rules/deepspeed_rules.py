"""How the rules of a DeepSpeed config differ from those of a spec file: what DeepSpeed lets pass, and what it ignores.

As `AutoTP` of DeepSpeed 0.19.8 runs a `partition_config` (module_inject/auto_tp.py, `_replace_module`): the first rule
that matches counts, column and row rules apply to the two-dimensional `weight` of a module alone, a bias follows its
weight, and what no rule names stays whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from autotp_plan.planner.deepspeed.limits import is_sharded_by_heads
from autotp_plan.planner.rules.matching import Decision, Rule, meaning
from autotp_plan.planner.rules.partition import replicated
from autotp_plan.schemas.plan.rule_ref import REST_RULE, Origin
from autotp_plan.schemas.spec import Spec

REST = Rule(ref=REST_RULE, spec=Spec(patterns=(), partition_type="skip"), patterns=(), trusted=False)
"""The rule for a weight that no rule of a DeepSpeed config names."""


def is_deepspeeds(rule: Rule) -> bool:
    """Whether a rule is one of a DeepSpeed config."""
    return rule.ref.origin is Origin.DS_CONFIG


def matching_rules(
    name: str, num_dims: int, is_bias: bool, lists: Sequence[Sequence[Rule]], trusted: Sequence[Rule]
) -> list[list[Rule]]:
    """For each list of rules those that match a parameter, of a DeepSpeed config those that also apply to it.

    Args:
        name: the parameter's.
        num_dims: its number of dimensions.
        is_bias: whether it is the bias of a weight.
        lists: compiled rules, in order of precedence.
        trusted: the preset's rules.
    """
    found = [[rule for rule in rules if rule.matches(name)] for rules in lists]
    if not any(is_deepspeeds(rule) for rules in found for rule in rules):
        return found
    known = next((rule for rule in trusted if rule.matches(name)), None)
    return [
        [rule for rule in rules if not is_deepspeeds(rule) or _applies(rule, name, num_dims, is_bias, known)]
        for rules in found
    ]


def _applies(rule: Rule, name: str, num_dims: int, is_bias: bool, known: Rule | None) -> bool:
    """Whether a rule does anything to it: a preset (`known`) may shard what DeepSpeed has no layer for."""
    spec = rule.spec
    if is_bias:
        return spec.grad_allreduce or spec.partition_type == "column"
    if spec.partition_type not in ("column", "row") or (known is not None and num_dims > 1):
        return True
    return num_dims == 2 and name.rpartition(".")[2] == "weight"


def as_deepspeed_runs(
    spec: Spec, name: str, shape: Sequence[int], *, heads: Collection[str], num_kv_heads: int, tp_size: int
) -> Spec:
    """The rule `spec` for one weight, with what DeepSpeed adds to it.

    A row-parallel head splits its replicated input itself. A size that `tp_size` does not divide is sharded unevenly,
    by KV heads where the config and the name of the layer allow it (module_inject/tp_shard.py, `get_shard_size`).

    Args:
        spec: a rule of a DeepSpeed config.
        name: the weight's.
        shape: the weight's.
        heads: names of modules that are heads (`lm_head_patterns`).
        num_kv_heads: the model's, 0 where its config has none.
        tp_size: number of TP ranks.
    """
    if spec.partition_type not in ("column", "row") or len(shape) != 2:
        return spec
    if spec.partition_type == "row" and name.removesuffix(".weight").rpartition(".")[2] in heads:
        spec = dataclasses.replace(spec, split_input=True)
    if (spec.shape, spec.unit, spec.partition_dim, spec.indivisible) != (None, None, None, "error"):
        return spec
    size = shape[spec.partition_type == "row"]
    if size % tp_size == 0 and (num_kv_heads % tp_size == 0 or size % num_kv_heads):
        return spec
    by_heads = num_kv_heads > 0 and size % num_kv_heads == 0 and is_sharded_by_heads(name)
    return dataclasses.replace(spec, unit=size // num_kv_heads if by_heads else None, indivisible="uneven")


def settle_ties(decisions: Mapping[str, Decision], tied: Mapping[str, str], notes: list[str]) -> dict[str, Decision]:
    """The decisions with a tied parameter replicated where a DeepSpeed config shards one of its names alone.

    DeepSpeed leaves both whole too when the head is column-parallel.

    Args:
        decisions: how every parameter and tied name is sharded.
        tied: second names, and the parameters that they name.
        notes: gets a sentence for each parameter.
    """
    settled = dict(decisions)
    for pair in tied.items():
        for name, other in (pair, pair[::-1]):
            if name not in decisions or other not in decisions:
                continue
            one = decisions[name]
            if decisions[other].rule == REST_RULE and one.rule.origin is Origin.DS_CONFIG and one.style != "replicated":
                layout = replicated(decisions[other].layout.shape)
                settled[name] = Decision(rule=one.rule, style="replicated", layout=layout)
                notes.append(
                    f"{name} is tied to {other}, which no rule names: both stay whole. Rules that shard both by "
                    'vocabulary are {"partition_type": "vocab"} for the embedding and {"gather_output": true} for the '
                    "head."
                )
    return settled


def shadowed(rules: Sequence[Rule], matched: Mapping[str, Sequence[Rule]]) -> Iterator[str]:
    """A sentence on each rule that decides nothing, because earlier ones with another meaning match all that it does.

    Args:
        rules: the rules of a DeepSpeed config.
        matched: for each parameter the rules that apply to it, in order.
    """
    for rule in rules:
        of_rule = [found for found in matched.values() if rule in found]
        if of_rule and all(found[0] is not rule for found in of_rule):
            others = dict.fromkeys(
                str(found[0].ref) for found in of_rule if meaning(found[0].spec) != meaning(rule.spec)
            )
            if others:
                yield (
                    f"{rule.ref} ({rule.spec.partition_type}) decides nothing: the first rule that matches counts, as "
                    f"in DeepSpeed, and that is {' or '.join(others)}."
                )
