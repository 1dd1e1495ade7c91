"""What plain DeepSpeed cannot do of a plan, entry by entry: for the export, and for notes on a `partition_config`.

DeepSpeed's AutoTP (0.19.8) shards linear layers evenly, gathers the output of one, all-reduces the gradient of a
replicated parameter, and divides some head counts, found by name. Whatever a plan needs beyond that is an obstacle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import ModuleAttribute, Parameter, PlannedModule

DIVIDED = frozenset(
    {"n_heads", "num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "embed_dim", "hidden_size"}
)
"""Attributes that DeepSpeed divides on modules with a sharded weight (AutoTP.update_mp_params), of those in presets."""
_KV_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv", "kv_n_heads",
                 "num_attention_heads", "n_heads", "attention_heads")  # fmt: skip
_SHARDED_WITHOUT_HEADS = ("mlp", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "lm_head", "embed_out")
"""In a layer's name: DeepSpeed shards it evenly, any other by KV heads (module_inject/tp_shard.py, get_shard_size)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacle:
    """What DeepSpeed cannot do: at a parameter or module, and why. Without `may_be_whole` it would train wrongly."""

    where: str
    reason: str
    may_be_whole: bool = False


def obstacles(plan: Plan) -> list[Obstacle]:
    """Everything in `plan` that plain DeepSpeed cannot do: its parameters in order, then its modules."""
    tied = {tie.to for tie in plan.tied}
    experts = _experts(plan)
    found = []
    if plan.sequence_parallel is not None:
        found.append(Obstacle(where="sequence_parallel", reason=_STREAM, may_be_whole=True))
    for entry in plan.parameters:
        if entry.name.startswith(experts) or expand(entry.name)[0].startswith(experts):
            found.append(Obstacle(where=entry.name, reason=_EXPERTS, may_be_whole=True))
        elif (reason := _obstacle(entry, plan.layouts[entry.layout], plan, entry.name in tied)) is not None:
            found.append(Obstacle(where=entry.name, reason=reason))
    return [*found, *_module_obstacles(plan, experts)]


def _experts(plan: Plan) -> tuple[str, ...]:
    """What the names of fused experts' parameters begin with."""
    return tuple(f"{one}." for module in plan.modules if _is_experts(module) for one in expand(module.module))


_STREAM = "DeepSpeed's AutoTP does not shard the sequence: every rank holds all tokens between the blocks"
_EXPERTS = "fused experts are no linear layers: DeepSpeed leaves them whole on every rank"


def _obstacle(entry: Parameter, layout: Layout, plan: Plan, tied: bool) -> str | None:
    if entry.add_once:
        return "it is added to a sum over the ranks, and DeepSpeed would add it on each"
    if entry.style == "vocab" or (entry.gather_output and tied):
        return None
    if entry.style == "replicated":
        return None
    if entry.style == "shard":
        return "DeepSpeed cuts linear layers only; this belongs to a module with a forward of its own"
    if entry.split_input:
        return "the layer's input is split over the ranks, which DeepSpeed does for a head only"
    if entry.gather_output and len(layout.sub_parameters) > 1:
        return "DeepSpeed does not gather the output of a layer with sub-parameters"
    if entry.partial_gradient or any(len(ranks) > 1 for _, ranks in iv.holders(layout.intervals)):
        return "several ranks share it (KV heads), and DeepSpeed does not sum their gradients"
    if len({iv.length(rank) for rank in layout.intervals}) > 1 and not entry.gather_output:
        return "the ranks' shares are of unequal size, and DeepSpeed decides those itself, from names"
    if layout.shape != plan.shape_of(entry):
        return f"it is cut in a view, {list(layout.shape)}, of a module that DeepSpeed has no layer for"
    expected = 0 if entry.style == "column" else len(layout.shape) - 1
    if len(layout.shape) > 1 and layout.dim != expected:
        return "its weight lies the other way round (Conv1D)"
    if not entry.gather_output and not _is_even(layout):
        return "a rank's share is not its even part of each sub-parameter, which is how DeepSpeed cuts"
    kv_heads = num_kv_heads(plan.model.config or {})
    if kv_heads % plan.tp_size and is_sharded_by_heads(entry.name):
        return f"DeepSpeed cuts it by KV heads, and {kv_heads} are not divisible by {plan.tp_size}"
    return None


def _module_obstacles(plan: Plan, experts: tuple[str, ...]) -> Iterator[Obstacle]:
    if _adds_in_place(plan.model.model_type, plan.model.config or {}):
        reason = "its layers add in place to the output of a row-parallel layer, which raises in DeepSpeed"
        yield Obstacle(where=f"model_type {plan.model.model_type}", reason=reason)
    for attribute in plan.module_attributes:
        inside = f"{expand(attribute.module)[0]}.".startswith(experts)
        if not inside and not _is_divided(attribute):
            yield Obstacle(
                where=f"{attribute.module}.{attribute.attribute}",
                reason="this count must be local, and it is none of those that DeepSpeed divides evenly by name",
            )
    for module in plan.modules:
        if _is_experts(module):
            continue  # told of its parameters
        if module.mean_over_ranks:
            reason = "its means must be taken over all ranks"
        elif module.buffers:
            reason = "its buffers must be split over the ranks"
        elif module.output is not None:
            reason = "part of its output goes straight to cut neighbours, so its gradient must be summed"
        else:
            reason = "its inputs must be split over the ranks (ALiBi, made for all heads)"
        yield Obstacle(where=module.module, reason=reason)


def _adds_in_place(model_type: str | None, config: Mapping[str, Any]) -> bool:
    """Whether transformers adds to a row-parallel output in place (modeling_falcon.py:619, modeling_llama4.py:172)."""
    parallel = bool(config.get("parallel_attn", True) or config.get("new_decoder_architecture"))
    return model_type == "llama4_text" or (model_type == "falcon" and parallel)


def _is_experts(module: PlannedModule) -> bool:
    return module.output is not None and module.output.operation == "reduce"


def _is_divided(attribute: ModuleAttribute) -> bool:
    return attribute.attribute in DIVIDED and len(set(attribute.values)) == 1


def _is_even(layout: Layout) -> bool:
    """Whether each rank's intervals are its even part of every sub-parameter, in order."""
    tp_size, start = len(layout.intervals), 0
    parts: list[list[iv.Interval]] = [[] for _ in range(tp_size)]
    for sub in layout.sub_parameters:
        size = sub.size // tp_size
        for rank, held in enumerate(parts):
            held.append((start + rank * size, start + (rank + 1) * size))
        start += sub.size
    return all(map(_same, parts, layout.intervals))


def _same(one: Sequence[iv.Interval], other: Sequence[iv.Interval]) -> bool:
    return iv.join_touching(one) == iv.join_touching(other)


def is_sharded_by_heads(name: str) -> bool:
    """Whether DeepSpeed shards the layer of the parameter `name` by KV heads, where the config has a number of them."""
    return not any(part in name for part in _SHARDED_WITHOUT_HEADS)


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """The number of KV heads by which DeepSpeed shards; 0 when the config has none."""
    value = next((config[key] for key in _KV_HEAD_KEYS if config.get(key) is not None), 0)
    return value if isinstance(value, int) else 0
