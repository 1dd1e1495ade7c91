"""Making DeepSpeed's engine for a sharded model: all ranks must ask for the same; whoever fails tells the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.utils import groups, log_dist
from torch import nn

from autotp_plan.runtime.calls.finite_engine import become_checked_engine
from autotp_plan.runtime.calls.sharded_engine import become_sharded_engine
from autotp_plan.runtime.checkpoint.mesh_change import why_this_mesh_only
from autotp_plan.runtime.data.loader import training_loader
from autotp_plan.runtime.data.random_numbers import check_random_numbers
from autotp_plan.runtime.deepspeed.agreement import check_same, in_step, together
from autotp_plan.runtime.deepspeed.attendance import SECONDS_FOR_FIRST, check_all_call
from autotp_plan.runtime.deepspeed.autotp_calls import check_autotp_calls
from autotp_plan.runtime.deepspeed.engine_config import check_settings, engine_config, unread_checkpointing
from autotp_plan.runtime.deepspeed.internals import skip_sums_over_one_rank
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.store_internals import set_time_limit
from autotp_plan.runtime.optimizers.choose import (
    adapt_engine,
    check_optimizer,
)
from autotp_plan.runtime.optimizers.finite import FiniteCheck
from autotp_plan.runtime.parameters.compared import (
    dtypes_of,
    flat,
    optimizer_of,
    settings_of,
)
from autotp_plan.runtime.tensor_parallel.dropout_rng import has_dropout
from autotp_plan.schemas.plan.document import Plan

_NO_ENGINE = "the engine could not be made"
_deepspeed_initialize = deepspeed.initialize  # which `adapt_trainer` replaces while a Trainer prepares its engine


def make_engine(
    plan: Plan,
    ranks: Ranks,
    model: nn.Module,
    config: str | os.PathLike[str] | dict[str, Any],
    *,
    training_data: Any,
    collate_fn: Callable[[Any], Any] | None,
    seed: int,
    num_workers: int | None,
    data_is_sharded: bool,
    skip_lone_sums: bool,
    split_fused: bool,
    check_finite: bool,
    timeout: float | None,
    arguments: dict[str, Any],
) -> tuple[Any, Any, Any, Any]:
    """As `TrainingPlan.initialize`, for the plan `plan`.

    `timeout` is the seconds that a rank waits for another, `arguments` are for `deepspeed.initialize`.
    """
    check_all_call("plan.initialize", seconds=SECONDS_FOR_FIRST)
    steps_in_full = plan.tp_size > 1 or split_fused

    def prepared() -> dict[str, Any]:
        settings = engine_config(config, plan)
        check_autotp_calls(arguments.pop("mpu", None), ranks)
        check_settings(settings, groups)
        if arguments.get("model_parameters") is None:
            arguments["model_parameters"] = [p for p in model.parameters() if p.requires_grad]
        if steps_in_full:
            arguments["optimizer"] = check_optimizer(arguments.get("optimizer"), settings, model)
        return settings

    settings = together(prepared, _NO_ENGINE, "correct what is wrong")
    check_same(
        {
            "plan": plan.fingerprint,
            "DeepSpeed config": settings_of(settings),
            "parameters": dtypes_of(model),
            "optimizer": optimizer_of(arguments.get("optimizer")),
            "options": flat([seed, data_is_sharded, skip_lone_sums, split_fused, training_data is None, check_finite]),
        },
        what="the ranks would make engines that differ",
        where="initialize",
        next_step="give every rank the same plan and arguments",
    )

    if plan.tp_size > 1 and has_dropout(model):
        check_random_numbers(ranks, "initialize")

    def made() -> tuple[Any, Any, Any]:
        engine, optimizer, _, scheduler = _deepspeed_initialize(model=model, config=settings, mpu=groups, **arguments)
        if timeout is not None:
            set_time_limit(timeout)  # of the groups that the engine has made, too
        if steps_in_full:
            adapt_engine(engine, settings, model, split_fused)
        return engine, optimizer, scheduler

    engine, optimizer, scheduler = in_step(made, _NO_ENGINE, "correct what is wrong on that rank, and start again")
    if plan.tp_size > 1:
        become_sharded_engine(engine, ranks)
    become_checked_engine(engine, FiniteCheck(engine, ranks.dp_rank, check_finite))
    if skip_lone_sums:
        skip_sums_over_one_rank(engine)
    if said := unread_checkpointing(settings, deepspeed.checkpointing.is_configured()):
        log_dist(said, [0], logging.WARNING)
    if reason := why_this_mesh_only(engine):
        log_dist(f"Checkpoints of this job cannot be resumed on every mesh: {reason}", [0], logging.WARNING)
    loader = None
    if training_data is not None:
        loader = training_loader(
            engine, training_data, ranks, collate_fn, seed=seed, num_workers=num_workers, is_sharded=data_is_sharded
        )
    return engine, optimizer, loader, scheduler
