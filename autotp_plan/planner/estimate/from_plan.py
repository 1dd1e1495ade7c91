"""What the plan alone says of a training step: weights, gradients, states, and what is sent for them. No torch.

The arithmetic of ZeRO's stages is that of Rajbhandari et al., ZeRO (2020), section 5: from stage 1 on a rank holds its
part of the optimizer's states, from stage 2 on of the gradients, at stage 3 of the weights.
"""

from __future__ import annotations

from autotp_plan.schemas.estimate.document import Estimate, Part, RankEstimate, Traffic, kinds_of_ranks
from autotp_plan.schemas.estimate.settings import OPTIMIZERS, Settings, check_settings
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan

MISSING = (
    "activations, logits and loss, temporary tensors",
    "gathered weights and buffers of ZeRO",
    "all-reduces of activations over the tensor-parallel group",
    "floating-point operations",
)
MISSING_OF_STREAM = (
    *MISSING[:2],
    "all-gathers and reduce-scatters of activations, and all-reduces of gradients of parameters that see a part of the "
    "tokens, over the tensor-parallel group",
    *MISSING[3:],
)
"""The same of a plan whose stream is sharded along the sequence."""
_FLOAT32 = 4


def elements_of_rank(plan: Plan, rank: int) -> int:
    """Elements of all parameters that a TP rank holds."""
    total = 0
    for entry in plan.parameters:
        count = 1
        for size in plan.layouts[entry.layout].rank_shape(rank):
            count *= size
        total += count * len(expand(entry.name))
    return total


def estimate_from_plan(plan: Plan, settings: Settings) -> Estimate:
    """What the plan says of a training step. What it does not is named as missing.

    Args:
        plan: of any model.
        settings: how it is trained; every parameter counts as trained.

    Raises:
        OptionError: the plan cannot be trained so.
    """
    check_settings(settings, plan)
    return Estimate(
        model=plan.model.architecture or plan.model.model_type or "",
        plan=plan.fingerprint,
        tp_size=plan.tp_size,
        settings=settings,
        measured=False,
        missing=MISSING if plan.sequence_parallel is None else MISSING_OF_STREAM,
        ranks=tuple(_rank(plan, ranks, settings) for ranks in kinds_of_ranks(plan)),
    )


def _rank(plan: Plan, ranks: tuple[int, ...], settings: Settings) -> RankEstimate:
    elements, dp_size, stage = elements_of_rank(plan, ranks[0]), settings.dp_size, settings.zero_stage
    part = -(-elements // dp_size)
    width = settings.element_bytes
    stepped = part if stage >= 1 else elements
    sizes = {
        "weights": width * (part if stage == 3 else elements),
        "gradients": width * (part if stage >= 2 else elements),
        "master weights": _FLOAT32 * stepped if width < _FLOAT32 or stage >= 1 else 0,
        "optimizer states": _FLOAT32 * stepped * OPTIMIZERS[settings.optimizer],
    }
    off_device = ("master weights", "optimizer states") if settings.offload == "optimizer" else ()
    held = [Part(what=what, bytes=size) for what, size in sizes.items() if size and what not in off_device]
    return RankEstimate(
        tp_ranks=ranks,
        peak=sum(one.bytes for one in held),
        when="of what is held all the time",
        at_peak=tuple(sorted(held, key=lambda one: -one.bytes)),
        host=tuple(Part(what=what, bytes=sizes[what]) for what in off_device if sizes[what]),
        traffic=tuple(_traffic(elements * width, settings)),
    )


def _traffic(size: int, settings: Settings) -> list[Traffic]:
    """What a step sends over the data-parallel ranks, in bytes of tensors; how many collectives ZeRO makes of it is its
    buckets' matter, and is counted as one."""
    if settings.dp_size == 1:
        return []
    stage, passes = settings.zero_stage, settings.gradient_accumulation_steps
    found = []
    if stage == 3:
        found.append(("all-gather", 2 * passes))
        found.append(("reduce-scatter", passes))
    else:
        found.append(("all-reduce", passes if stage == 2 else 1))
        if stage >= 1:
            found.append(("all-gather", 1))
    return [
        Traffic(operation=operation, group="data", count=times, bytes=times * size)
        for operation, times in sorted(found)
    ]
