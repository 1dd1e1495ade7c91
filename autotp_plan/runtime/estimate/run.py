"""An estimate of a plan: one process for each kind of rank, which runs two training steps without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from autotp_plan.runtime.estimate.processes import TIMEOUT, run_without_data
from autotp_plan.schemas.estimate.document import Estimate, RankEstimate, kinds_of_ranks
from autotp_plan.schemas.estimate.settings import Settings, check_settings
from autotp_plan.schemas.plan.document import Plan

_MISSING = ("what the device's libraries take: contexts, workspaces, buffers of NCCL, fragments of the allocator",)


def estimate_by_running(
    plan: Plan, settings: Settings, config: Mapping[str, Any] | None = None, timeout: float = TIMEOUT
) -> Estimate:
    """What a training step of a plan takes, by running the model's code and DeepSpeed's on tensors without data.

    Args:
        plan: of a transformers model.
        settings: how it is trained.
        config: a DeepSpeed config with further settings; what `settings` say counts.
        timeout: seconds for each kind of rank.

    Raises:
        OptionError: the plan cannot be trained so.
        MismatchError: the plan has no config, or the DeepSpeed config has a wrong value.
        CheckpointError: transformers cannot build the model.
        CompileError: the model's code does not run without data, or takes too long.
    """
    check_settings(settings, plan)
    found = []
    for ranks in kinds_of_ranks(plan):
        (one,) = run_without_data(
            _run_rank, 1, plan, ranks[0], settings, dict(config or {}),
            where=f"TP rank {ranks[0]} of {plan.tp_size}", what="two steps", timeout=timeout,
        )  # fmt: skip
        found.append(dataclasses.replace(one, tp_ranks=ranks))
    return Estimate(
        model=plan.model.architecture or plan.model.model_type or "",
        plan=plan.fingerprint,
        tp_size=plan.tp_size,
        settings=settings,
        measured=True,
        missing=_MISSING,
        ranks=tuple(found),
    )


def _run_rank(plan: Plan, tp_rank: int, settings: Settings, config: dict[str, Any]) -> RankEstimate:
    from autotp_plan.runtime.estimate.engine_step import engine_step

    return engine_step(plan, tp_rank, settings, config)
