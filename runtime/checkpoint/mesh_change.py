"""A job that goes on on another mesh: other TP and DP sizes, another ZeRO stage, or another plan of the same model.

The state that this rank's optimizer would have saved is put together from the saved one, shard by shard, and loaded
the way DeepSpeed loads its own. Its universal checkpoint would be rewritten on disk first, knows Adam alone, and pairs
parameters by name, which the pieces of shards that are shared in part do not keep from one TP size to another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, LOSS_SCALER, OPTIMIZER_STATE_DICT
from torch import Tensor

from autotp_plan.runtime.checkpoint.zero_files import WEIGHTS, SavedJob
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.tensor_parallel.partly_replicated import cut_piece, split_shared
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import config_hash


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run of a flattened parameter lies in this rank's flat groups."""

    group: int
    start: int
    at: int
    numel: int


def why_not(engine: Any) -> str:
    """Why a job of `engine` cannot be resumed on every mesh; empty when it can be."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return "under ZeRO stage 0 only the number of DP ranks may change; use stage 1, 2 or 3"
    if stage == 3 and not all(parameter.requires_grad for parameter in engine.module.parameters()):
        return "ZeRO stage 3 saves frozen parameters in a form of its own; use stage 1 or 2"
    if getattr(engine.optimizer, "swap_optimizer", False):
        return "the optimizer's state lies on NVMe, in files of each rank"
    return ""


def unlike(saved: Plan, plan: Plan) -> list[Fault]:
    """What tells the two plans' models apart; empty when they are plans of the same model."""
    before = {parameter.name: saved.shape_of(parameter) for parameter in saved.expanded()}
    after = {parameter.name: plan.shape_of(parameter) for parameter in plan.expanded()}
    faults = [
        Fault(
            what="the saved job is of another model",
            where=name,
            got=str(list(before[name])) if name in before else "no such parameter",
            expected=str(list(after[name])) if name in after else "no such parameter",
            next="resume with a plan of the model that was saved",
        )
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if not faults and config_hash(saved.model.config) != config_hash(plan.model.config):
        faults = [
            Fault(
                what="the saved job is of another model",
                where="config.json",
                got=str(config_hash(saved.model.config)),
                expected=str(config_hash(plan.model.config)),
                next="resume with a plan of the model that was saved",
            )
        ]
    return faults


@torch.no_grad()
def load_elsewhere(engine: Any, saved: SavedJob, plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """Load weights, optimizer, scheduler and counters of `saved` into `engine`. Returns the client state."""
    in_parts = engine.zero_optimization_stage() == 3
    if in_parts:
        engine.optimizer.checkpoint_event_prologue()
    _load_unoptimized(engine, saved, plan, ranks)
    _load_optimizer(engine, saved, plan, ranks)
    if in_parts:
        engine.optimizer.checkpoint_event_epilogue()
    state = saved.engine_state
    if engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = state["global_steps"], state["skipped_steps"]
    engine.global_samples = state["global_samples"]
    return state


def _load_optimizer(engine: Any, saved: SavedJob, plan: Plan, ranks: Ranks) -> None:
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    weights = _flat_weights(optimizer, stage)
    places = _places(optimizer, engine.module, stage)
    states: dict[int, dict[str, Any]] = defaultdict(dict)
    for parameter in plan.expanded():
        layout, shape = plan.layouts[parameter.layout], plan.shape_of(parameter)
        owner, dot, leaf = parameter.name.rpartition(".")
        pieces = split_shared(leaf, layout, shape, ranks.tp_rank)
        wanted = [(piece, place) for piece in pieces for place in places.get(owner + dot + piece.name, ())]
        if not wanted:
            continue
        for piece in pieces:
            places.pop(owner + dot + piece.name, None)
        for key in saved.keys(parameter.name) or [WEIGHTS]:  # one that was frozen has no state yet
            shard = saved.shard(parameter.name, key, layout, ranks.tp_rank)
            for piece, place in wanted:
                part = shard if len(pieces) == 1 else cut_piece(piece, shard, layout, ranks.tp_rank)
                flat = weights[place.group]
                if key != WEIGHTS:
                    flat = states[place.group].setdefault(key, torch.zeros_like(flat))
                flat.narrow(0, place.at, place.numel).copy_(part.reshape(-1).narrow(0, place.start, place.numel))
        for _, place in wanted:
            states[place.group].update(saved.scalars(parameter.name))
    assert not places, f"parameters that the plan does not have: {sorted(places)}"
    state = optimizer.state_dict()
    loaded = saved.optimizer_state
    key = BASE_OPTIMIZER_STATE if stage < 3 else OPTIMIZER_STATE_DICT
    hyperparameters = _hyperparameters(state[key]["param_groups"], loaded[saved.base_key]["param_groups"])
    state[key] = {"state": dict(states), "param_groups": hyperparameters}
    for name in (LOSS_SCALER, "dynamic_loss_scale", "overflow"):
        if name in state and name in loaded:
            state[name] = loaded[name]
    optimizer.load_state_dict([state] * ranks.dp_size, load_optimizer_states=True, load_from_fp32_weights=True)
    if stage < 3:
        optimizer.update_lp_params()


def _flat_weights(optimizer: Any, stage: int) -> list[Tensor]:
    """This rank's float32 weights: what the optimizer steps, one flat tensor per group."""
    if stage == 3:
        flat = optimizer.fp32_partitioned_groups_flat
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        flat = optimizer.single_partition_of_fp32_groups
    else:
        flat = optimizer.fp32_groups_flat_partition
    return [tensor.data for tensor in flat]


def _places(optimizer: Any, module: torch.nn.Module, stage: int) -> dict[str, list[Place]]:
    """Where this rank holds a part of each parameter of `module`, by name."""
    found: dict[str, list[Place]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        for place in _stage_3(optimizer, parameter) if stage == 3 else _stage_1_and_2(parameter):
            found[name].append(place)
    return found


def _stage_1_and_2(parameter: Any) -> Iterator[Place]:
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        held, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        yield Place(group=mapping.param_group_index, start=held.start, at=flat.start, numel=held.numel)


def _stage_3(optimizer: Any, parameter: Any) -> Iterator[Place]:
    if parameter.requires_grad:
        group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * size
        numel = min(size, parameter.ds_numel - start)
        if numel > 0:
            yield Place(group=group, start=start, at=at, numel=numel)


def _hyperparameters(mine: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved learning rates and so on, for this rank's flat tensors."""
    if len(mine) != len(saved):
        raise MismatchError(
            Fault(
                what="the saved optimizer has other parameter groups",
                where="optimizer",
                got=f"{len(saved)} groups",
                expected=f"{len(mine)} groups",
                next="make the optimizer with the groups of the saved job",
            )
        )
    return [{**group, "params": own["params"]} for own, group in zip(mine, saved)]


def _load_unoptimized(engine: Any, saved: SavedJob, plan: Plan, ranks: Ranks) -> None:
    """Frozen parameters, and the buffers that are saved."""
    frozen = {name: held for name, held in engine.module.named_parameters() if not held.requires_grad}
    held = {**frozen, **dict(engine.module.named_buffers())}
    for parameter in plan.expanded():
        layout, shape = plan.layouts[parameter.layout], plan.shape_of(parameter)
        owner, dot, leaf = parameter.name.rpartition(".")
        pieces = split_shared(leaf, layout, shape, ranks.tp_rank)
        wanted = [(piece, held.pop(owner + dot + piece.name, None)) for piece in pieces]
        if all(target is None for _, target in wanted):
            continue
        shard = saved.shard(parameter.name, WEIGHTS, layout, ranks.tp_rank)
        for piece, target in wanted:
            if target is not None:
                part = shard if len(pieces) == 1 else cut_piece(piece, shard, layout, ranks.tp_rank)
                target.copy_(part.reshape(target.shape))
    module: dict[str, Tensor] = saved.engine_state["module"]
    for name, target in held.items():
        if name in module:
            target.copy_(module[name])
