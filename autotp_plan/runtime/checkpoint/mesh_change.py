"""Resuming a job on a different TP x DP mesh, ZeRO stage, or plan of the same model.

The state that this rank's optimizer would have saved is put together from the saved one, shard by shard, and loaded
as DeepSpeed loads what it saved. Its universal checkpoint would be rewritten on disk first, knows Adam alone, and pairs
parameters by name, which partly replicated parameters do not keep from one TP size to another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.checkpoint.flat_groups import check_flat_groups
from autotp_plan.runtime.checkpoint.zero_files import WEIGHTS, SavedJob
from autotp_plan.runtime.deepspeed.agreement import together
from autotp_plan.runtime.deepspeed.internals import is_deepspeed_muon
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import (
    FlatRange,
    flat_groups,
    full_parameters,
    held_ranges,
    load_optimizer_state,
    swaps_to_disk,
)
from autotp_plan.runtime.parameters.partly_replicated import held_parameters, slice_held
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import config_hash


def why_this_mesh_only(engine: Any) -> str:
    """Why a job of `engine` can be resumed only on the mesh it was saved on; empty when it can be on every mesh."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return "under ZeRO stage 0 only the number of DP ranks may change; use stage 1, 2 or 3"
    if stage == 3 and not all(parameter.requires_grad for parameter in engine.module.parameters()):
        return "ZeRO stage 3 saves frozen parameters in another form; use stage 1 or 2"
    if swaps_to_disk(engine.optimizer):
        return "the optimizer's state lies on NVMe, in files of each rank"
    if is_deepspeed_muon(getattr(engine, "basic_optimizer", None)):
        return "DeepSpeed's Muon keeps its momentum in a form of its own under ZeRO"
    return ""


def model_differences(saved: Plan, plan: Plan) -> list[Fault]:
    """What tells the models of two plans apart; empty when they are plans of the same model."""
    before = {parameter.name: saved.shape_of(parameter) for parameter in saved.expanded()}
    after = {parameter.name: plan.shape_of(parameter) for parameter in plan.expanded()}
    faults = [
        _other_model(
            name,
            str(list(before[name])) if name in before else "no such parameter",
            str(list(after[name])) if name in after else "no such parameter",
        )
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    saved_config, config = config_hash(saved.model.config), config_hash(plan.model.config)
    if not faults and saved_config != config:
        faults = [_other_model("config.json", str(saved_config), str(config))]
    return faults


def _other_model(where: str, got: str, expected: str) -> Fault:
    return Fault(
        what="the saved job is of another model",
        where=where,
        got=got,
        expected=expected,
        next="resume with a plan of the model that was saved",
    )


@torch.no_grad()
def load_from_other_mesh(engine: Any, saved: SavedJob, plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """Load weights, optimizer, scheduler and counters of `saved` into `engine`; every rank calls it.

    Args:
        engine: an engine under ZeRO 1, 2 or 3 for a model that is sharded by `plan`.
        saved: the checkpoint of the job.
        plan: the plan to resume with, of the same model as the saved one.
        ranks: this process's place in the mesh.

    Returns:
        What the engine saved next to the weights: counters, scheduler, client state.

    Raises:
        MismatchError: the optimizer has other parameter groups, or parameters that the plan does not have (adapters,
            say), or ZeRO's flat groups are not filled exactly.
        CheckpointError: what was saved cannot be read, or does not fill the saved flat groups exactly.
        MissingDependencyError: this version of DeepSpeed holds or saves them in another way.

    All of them before anything is changed.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer

    def checked() -> dict[str, list[FlatRange]]:
        saved.check()
        _check_param_groups(len(optimizer.param_groups), len(saved.optimizer_state.param_groups))
        ranges = held_ranges(optimizer, engine.module, stage)
        check_flat_groups(flat_groups(optimizer), ranges, _planned_sizes(ranges, plan, ranks.tp_rank), ranks)
        return ranges

    ranges = together(checked, "the checkpoint could not be read", "correct what is wrong, or resume from another tag")
    with full_parameters(engine):
        _load_unoptimized(engine, saved, plan, ranks)
        states = _fill_flat_groups(flat_groups(optimizer), ranges, saved, plan, ranks)
        load_optimizer_state(optimizer, stage, ranks.dp_size, states, saved.optimizer_state)
    state = saved.engine_state
    if engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = state["global_steps"], state["skipped_steps"]
    engine.global_samples = state["global_samples"]
    return state


def _check_param_groups(have: int, saved: int) -> None:
    if have != saved:
        raise MismatchError(
            Fault(
                what="the saved optimizer has other parameter groups",
                where="optimizer",
                got=f"{saved} groups",
                expected=f"{have} groups",
                next="make the optimizer with the groups of the saved job",
            )
        )


def _planned_sizes(names: Collection[str], plan: Plan, tp_rank: int) -> dict[str, int]:
    """Number of elements that a rank holds of each of its parameters `names`. Raises MismatchError for other names."""
    sizes = {
        one.name: math.prod(one.layout.rank_shape(tp_rank))
        for parameter in plan.expanded()
        for one in held_parameters(parameter.name, plan.layouts[parameter.layout], plan.shape_of(parameter), tp_rank)
    }
    faults = [
        Fault(
            what="a trained parameter is not the plan's, and can be resumed only on the mesh it was saved on",
            where=name,
            got="a parameter that was added to the model",
            expected="parameters of the plan",
            next="resume on the mesh and ZeRO stage the job was saved on",
        )
        for name in sorted(set(names) - sizes.keys())
    ]
    if faults:
        raise MismatchError(faults)
    return {name: sizes[name] for name in names}


def _fill_flat_groups(
    weights: list[Tensor], ranges: Mapping[str, Sequence[FlatRange]], saved: SavedJob, plan: Plan, ranks: Ranks
) -> dict[int, dict[str, Any]]:
    """Copy the saved float32 weights into `weights`, this rank's flat groups. Returns their optimizer states."""
    states: dict[int, dict[str, Any]] = defaultdict(dict)
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        held = held_parameters(parameter.name, layout, plan.shape_of(parameter), ranks.tp_rank)
        wanted = [(one, flat_range) for one in held for flat_range in ranges.get(one.name, ()) if flat_range.numel]
        if not wanted:
            continue
        for key in saved.keys(parameter.name) or [WEIGHTS]:  # a parameter that was frozen has no state yet
            shard = saved.shard(parameter.name, key, layout, ranks.tp_rank)
            for one, at in wanted:
                flat = weights[at.group]
                if key != WEIGHTS:
                    flat = states[at.group].setdefault(key, torch.zeros_like(flat))
                part = slice_held(one, shard, layout, ranks.tp_rank).reshape(-1)
                flat.narrow(0, at.at, at.numel).copy_(part.narrow(0, at.start, at.numel))
        for _, at in wanted:
            states[at.group].update(saved.scalars(parameter.name))
    return dict(states)


def _load_unoptimized(engine: Any, saved: SavedJob, plan: Plan, ranks: Ranks) -> None:
    """Frozen parameters, and the buffers that are saved."""
    frozen = {name: held for name, held in engine.module.named_parameters() if not held.requires_grad}
    targets = {**frozen, **dict(engine.module.named_buffers())}
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        held = held_parameters(parameter.name, layout, plan.shape_of(parameter), ranks.tp_rank)
        wanted = [(one, targets.pop(one.name)) for one in held if one.name in targets]
        if not wanted:
            continue
        shard = saved.shard(parameter.name, WEIGHTS, layout, ranks.tp_rank)
        for one, target in wanted:
            target.copy_(slice_held(one, shard, layout, ranks.tp_rank).reshape(target.shape))
    for name, target in targets.items():
        found = saved.buffer(name)
        if found is not None:
            target.copy_(found)
