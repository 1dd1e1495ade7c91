"""A plan in the words of plain DeepSpeed: a `partition_config`, where those words are enough.

Whatever no pattern of a `partition_config` matches is replicated. So embeddings and a tied head become replicated,
which is right and takes more memory; fused experts may be. What else DeepSpeed cannot do is in `limits`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autotp_plan.planner.deepspeed.limits import Obstacle, obstacles
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand, starred
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter
from autotp_plan.schemas.plan.without_stream import without_stream

TRIED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "starcoder2", "glm"}
    | {"glm4", "phi", "gpt_neox", "opt", "codegen", "gpt_bigcode", "mixtral", "qwen2_moe", "qwen3_moe", "dbrx"}
    | {"granitemoe"}
)
"""The `model_type`s whose export plain DeepSpeed computed with, compared with the dense model (test_export.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A `partition_config`, what is `replicated` by it though the plan shards it, and what it cannot express.

    `share` is the part of all parameters that a rank then holds. `tried`: plain DeepSpeed was compared with the dense
    model for models of this type.
    """

    partition_config: dict[str, Any]
    replicated: tuple[str, ...]
    obstacles: tuple[Obstacle, ...]
    share: float
    tried: bool

    @property
    def trains_rightly(self) -> bool:
        """Whether DeepSpeed computes what the dense model does, be it with more of the model on each rank."""
        return all(obstacle.may_be_whole for obstacle in self.obstacles)


def export_to_deepspeed(plan: Plan) -> Export:
    """`plan` as a `partition_config` of DeepSpeed's `tensor_parallel` section (module_inject/autotp_config.py).

    Returns:
        the config, which trains rightly where `Export.trains_rightly`, and what stands in the way of the rest.
    """
    found = obstacles(plan)
    plan = without_stream(plan)
    reasons = {obstacle.where: obstacle for obstacle in found}
    tied = {tie.to for tie in plan.tied}
    rules: dict[str, dict[str, Any] | None] = {}
    replicated: list[str] = []
    for entry in plan.parameters:
        rule: dict[str, Any] | None = None
        if entry.name in reasons:
            rule = {"partition_type": "skip"} if reasons[entry.name].may_be_whole else None
        elif entry.style == "vocab" or (entry.gather_output and entry.name in tied):
            replicated.append(entry.name)
        else:
            rule = _rule(entry, plan.layouts[entry.layout], plan)
        rules[entry.name] = rule
    replicated += [tie.name for tie in plan.tied if tie.to in replicated]
    return Export(
        partition_config={"use_default_specs": False, "layer_specs": _specs(rules)},
        replicated=tuple(replicated),
        obstacles=tuple(found),
        share=_share(plan, {*replicated, *reasons}),
        tried=plan.model.model_type in TRIED,
    )


def _share(plan: Plan, replicated: Collection[str]) -> float:
    """The share of the parameters that the fullest rank holds when those of `replicated` are not sharded."""
    total = 0
    held = [0] * plan.tp_size
    for entry in plan.parameters:
        layout, count = plan.layouts[entry.layout], len(expand(entry.name))
        total += count * math.prod(layout.shape)
        for rank in range(plan.tp_size):
            held[rank] += count * math.prod(layout.shape if entry.name in replicated else layout.rank_shape(rank))
    return max(held) / total


def _rule(entry: Parameter, layout: Layout, plan: Plan) -> dict[str, Any] | None:
    """A rule without its patterns; None for what needs no rule."""
    if entry.style == "replicated":
        if entry.partial_gradient:
            return {"partition_type": "skip", "grad_allreduce": True}
        return {"partition_type": "skip"} if len(plan.shape_of(entry)) > 1 else None
    if len(plan.shape_of(entry)) == 1:
        return None  # a bias goes with its weight
    rule: dict[str, Any] = {"partition_type": entry.style}
    if entry.gather_output:
        return {**rule, "gather_output": True}
    sizes = [sub.size for sub in layout.sub_parameters]
    if len(sizes) > 1:
        assert layout.dim is not None
        shape: list[Any] = [-1] * len(layout.shape)
        shape[layout.dim] = len(sizes) if len(set(sizes)) == 1 else sizes
        rule |= {"shape": shape, "partition_dim": layout.dim}
    return rule


def _specs(rules: Mapping[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Rules in order, each once. A pattern stands for all layers only where none of them differs."""
    by_template: dict[str, list[dict[str, Any] | None]] = {}
    for name, rule in rules.items():
        by_template.setdefault(starred(expand(name)[0]), []).append(rule)
    specs: list[dict[str, Any]] = []
    for name, rule in rules.items():
        if rule is None:
            continue
        in_every_layer = all(other == rule for other in by_template[starred(expand(name)[0])])
        pattern = _pattern(name, r"\d+" if in_every_layer else None)
        same = next((spec for spec in specs if {**spec, "patterns": 0} == {"patterns": 0, **rule}), None)
        if same is None:
            specs.append({"patterns": [pattern], **rule})
        elif pattern not in same["patterns"]:
            same["patterns"].append(pattern)
    return specs


def _pattern(name: str, number: str | None) -> str:
    """A regular expression for the names that `name` stands for, with `number` for each number where given."""
    if number is not None:
        return re.escape(starred(expand(name)[0])).replace(r"\*", number) + "$"
    parts = re.split(r"(\{[^}]*\})", name)
    return "".join(_one_of(expand(part)) if part.startswith("{") else re.escape(part) for part in parts) + "$"


def _one_of(numbers: Iterable[str]) -> str:
    return "(?:" + "|".join(numbers) + ")"
