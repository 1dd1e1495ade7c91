"""Warns about what a preset added to a DeepSpeed `partition_config`: plain DeepSpeed would not do it.

The rules of such a config may shard every weight rightly and plain DeepSpeed still computes something else, because no
rule of it can express the rest, or because a rule is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autotp_plan.planner.deepspeed.limits import obstacles
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter
from autotp_plan.schemas.plan.rule_ref import Origin


def notes_on_partition_config(plan: Plan, preset: str) -> Iterator[str]:
    """Notes on what `preset` added to the `partition_config` that `plan` was made by, and DeepSpeed would not do."""
    added = [entry for entry in plan.parameters if _is_added(entry)]
    cut = [entry.name for entry in added if entry.style in ("column", "row") and entry.name.endswith(".weight")]
    if cut:
        yield (
            f"The partition_config has no rule for {_few(cut)}; preset {preset!r} has. "
            "DeepSpeed would leave them whole on every rank, without a word."
        )
    partial = [entry.name for entry in added if entry.partial_gradient and not entry.add_once]
    if partial:
        yield (
            f"The partition_config does not say that the gradients of {_few(partial)} are partial; preset {preset!r} "
            "does. DeepSpeed would not sum them: right logits, wrong gradients, without a word."
        )
    reasons: dict[str, list[str]] = {}
    for obstacle in obstacles(plan):
        reasons.setdefault(obstacle.reason, []).append(obstacle.where)
    for reason, names in reasons.items():
        yield f"Preset {preset!r} adds what plain DeepSpeed cannot do at {_few(names)}: {reason}."


def _is_added(entry: Parameter) -> bool:
    """Whether rules of a preset decided it; the vocabulary is theirs always."""
    return entry.rule.origin is not Origin.DS_CONFIG and entry.style != "vocab" and not entry.gather_output


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
