"""What a preset adds to a DeepSpeed `partition_config`: said, so that nobody believes that the config had it.

The rules of such a config may cut every weight rightly and plain DeepSpeed still computes something else, because no
rule of it can say the rest, or because a rule is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from autotp_plan.planner.deepspeed.export import export_to_deepspeed
from autotp_plan.schemas.plan.document import Parameter, Plan

DS_CONFIG = "ds-config"
"""The label of the rules of a `partition_config`."""


def noted(plan: Plan, preset: str) -> Plan:
    """`plan`, made by a `partition_config` and `preset`, with notes on what the preset added."""
    notes = tuple(_notes(plan, preset))
    return dataclasses.replace(plan, notes=(*plan.notes, *notes)) if notes else plan


def _notes(plan: Plan, preset: str) -> Iterator[str]:
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
    for obstacle in export_to_deepspeed(plan).obstacles:
        reasons.setdefault(obstacle.reason, []).append(obstacle.where)
    for reason, names in reasons.items():
        yield f"Preset {preset!r} adds what plain DeepSpeed cannot do at {_few(names)}: {reason}."


def _is_added(entry: Parameter) -> bool:
    """Whether rules of a preset decided it; the vocabulary is theirs always."""
    return not entry.rule.startswith(DS_CONFIG) and entry.style != "vocab" and not entry.gather_output


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
