"""A plan in the words of plain DeepSpeed: a `partition_config`, where those words are enough.

DeepSpeed's AutoTP cuts linear layers evenly, and whatever no pattern matches is whole. So embeddings and head become
whole (right, at the price of memory), and a plan that needs anything else cannot be exported: it would train wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import starred
from autotp_plan.schemas.plan import Parameter, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacle:
    """What DeepSpeed cannot do: at a parameter or module, and why."""

    where: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A `partition_config`, what becomes `whole` by it though the plan cuts it, and what cannot be said at all.

    With obstacles the config would train wrongly: it is for reading only.
    """

    partition_config: dict[str, Any]
    whole: tuple[str, ...]
    obstacles: tuple[Obstacle, ...]


def export_to_deepspeed(plan: Plan) -> Export:
    """`plan` as a `partition_config` of DeepSpeed's `tensor_parallel` section (module_inject/autotp_config.py)."""
    specs: list[dict[str, Any]] = []
    whole: list[str] = []
    obstacles: list[Obstacle] = []
    for entry in plan.parameters:
        layout = plan.layouts[entry.layout]
        reason = _obstacle(entry, layout, plan)
        if reason is not None:
            obstacles.append(Obstacle(where=entry.name, reason=reason))
        elif entry.style == "vocab" or entry.gather_output:
            whole.append(entry.name)
        elif entry.style in ("column", "row") and len(plan.shape_of(entry)) > 1:
            specs.append(_spec(entry, layout))
    whole += [tie.name for tie in plan.tied if tie.to in whole]
    obstacles += _module_obstacles(plan)
    config = {"use_default_specs": False, "layer_specs": _merged(specs)}
    return Export(partition_config=config, whole=tuple(whole), obstacles=tuple(obstacles))


def _obstacle(entry: Parameter, layout: Layout, plan: Plan) -> str | None:
    if entry.add_once:
        return "it is added to a sum over the ranks, and DeepSpeed would add it on each"
    if entry.partial_gradient:
        return "each rank computes part of its gradient, and DeepSpeed does not sum it: wrong gradients, without a word"
    if entry.style == "replicated":
        return None
    if entry.style == "shard":
        return "DeepSpeed cuts linear layers only; this belongs to a module with a forward of its own"
    if entry.style == "vocab" or (entry.gather_output and _is_head(entry)):
        return None
    if entry.gather_output or entry.split_input:
        return "the plan gathers this layer's output or splits its input, and DeepSpeed would leave it cut"
    if any(len(ranks) > 1 for _, ranks in iv.holders(layout.intervals)):
        return "several ranks share it (KV heads), and DeepSpeed does not sum their gradients"
    if len({iv.length(rank) for rank in layout.intervals}) > 1:
        return "the ranks' shares are of unequal size, and DeepSpeed decides those itself, from names"
    if layout.shape != plan.shape_of(entry):
        return f"it is cut in a view, {list(layout.shape)}, of a module that DeepSpeed has no layer for"
    expected = 0 if entry.style == "column" else len(layout.shape) - 1
    if len(layout.shape) > 1 and layout.dim != expected:
        return "its weight lies the other way round (Conv1D)"
    return None


def _module_obstacles(plan: Plan) -> Iterator[Obstacle]:
    for attribute in plan.module_attributes:
        yield Obstacle(
            where=f"{attribute.module}.{attribute.attribute}",
            reason="this count must be local; DeepSpeed sets some such attributes by guess and others not",
        )
    for module in plan.modules:
        if module.mean_over_ranks:
            reason = "its means must be taken over all ranks"
        elif module.output is not None and module.output.operation == "reduce":
            reason = "fused experts: what enters and leaves them must be summed over the ranks, routing weights too"
        elif module.output is not None:
            reason = "part of its output goes straight to cut neighbours, so its gradient must be summed"
        else:
            reason = "its inputs must be split over the ranks (ALiBi, made for all heads)"
        yield Obstacle(where=module.module, reason=reason)


def _is_head(entry: Parameter) -> bool:
    return not any(part.isdecimal() or part.startswith("{") for part in entry.name.split("."))


def _spec(entry: Parameter, layout: Layout) -> dict[str, Any]:
    spec: dict[str, Any] = {"patterns": [_pattern(entry.name)], "partition_type": entry.style}
    sizes = [sub.size for sub in layout.sub_parameters]
    if len(sizes) > 1:
        assert layout.dim is not None
        shape: list[Any] = [-1] * len(layout.shape)
        shape[layout.dim] = len(sizes) if len(set(sizes)) == 1 else sizes
        spec |= {"shape": shape, "partition_dim": layout.dim}
    return spec


def _pattern(name: str) -> str:
    digits = re.sub(r"\{[^}]*\}", "0", name)
    return re.escape(starred(digits)).replace(r"\*", r"\d+") + "$"


def _merged(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Alike rules as one, in order."""
    merged: list[dict[str, Any]] = []
    for spec in specs:
        same = next((one for one in merged if {**one, "patterns": 0} == {**spec, "patterns": 0}), None)
        if same is None:
            merged.append(spec)
        else:
            same["patterns"] = list(dict.fromkeys(same["patterns"] + spec["patterns"]))
    return merged
