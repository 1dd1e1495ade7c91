"""Warns about what a preset added to a DeepSpeed `partition_config`: plain DeepSpeed would not do it.

The rules of such a config may shard every weight rightly and plain DeepSpeed still computes something else, because no
rule of it can express the rest, or because a rule is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from autotp_plan.planner.deepspeed.limits import obstacles
from autotp_plan.schemas.names import expand, some
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter
from autotp_plan.schemas.plan.rule_ref import REST_RULE, Origin
from autotp_plan.schemas.storage.safetensors_header import num_bytes


def notes_on_partition_config(plan: Plan, preset: str) -> Iterator[str]:
    """Notes on what `preset` added to the `partition_config` that `plan` was made by, and DeepSpeed would not do."""
    added = [entry for entry in plan.parameters if _is_added(entry)]
    cut = [entry.name for entry in added if entry.style in ("column", "row") and entry.name.endswith(".weight")]
    if cut:
        yield (
            f"The partition_config has no rule for {some(cut, 4)}; preset {preset!r} has. "
            "DeepSpeed would leave them whole on every rank, without a word."
        )
    partial = [entry.name for entry in added if entry.partial_gradient and not entry.add_once]
    if partial:
        yield (
            f"The partition_config does not say that the gradients of {some(partial, 4)} are partial; preset "
            f"{preset!r} does. DeepSpeed would not sum them: right logits, wrong gradients, without a word."
        )
    reasons: dict[str, list[str]] = {}
    for obstacle in obstacles(plan):
        reasons.setdefault(obstacle.reason, []).append(obstacle.where)
    for reason, names in reasons.items():
        yield f"Preset {preset!r} adds what plain DeepSpeed cannot do at {some(names, 4)}: {reason}."


def notes_on_the_rest(plan: Plan) -> Iterator[str]:
    """A note on the weights that no rule of a DeepSpeed config names, with their bytes; nothing when there are none."""
    sizes = {
        entry.name: len(expand(entry.name)) * num_bytes(entry.dtype, plan.shape_of(entry)) for entry in plan.parameters
    }
    rest = [entry.name for entry in plan.parameters if entry.rule == REST_RULE]
    if rest:
        held, total = sum(sizes[name] for name in rest), sum(sizes.values())
        count, share = sum(len(expand(name)) for name in rest), 100 * held / max(total, 1)
        yield (
            f"{count} parameter{'s' if count > 1 else ''}, {held} bytes ({share:.1f} % of the model), stay replicated "
            f"because no rule names them, as in DeepSpeed: {some(rest, 4)}. `--strict` makes this an error."
        )


def _is_added(entry: Parameter) -> bool:
    """Whether rules of a preset decided it; the vocabulary is theirs always."""
    return (
        entry.rule.origin not in (Origin.DS_CONFIG, Origin.REST) and entry.style != "vocab" and not entry.gather_output
    )
