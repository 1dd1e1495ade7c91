"""What DeepSpeed saved of a job under ZeRO 1, 2 or 3, parameter by parameter: for a job on another mesh.

Every file of a job holds one TP rank's pieces of the parameters (`pieces.py`), of which ZeRO gives each DP rank a run.
The files are mapped into memory, and only the bytes that are asked for are read. They are pickles, as DeepSpeed writes
them: a job's checkpoint is loaded by whoever trained it, unlike shards, which may come from strangers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.tensor_parallel.partly_replicated import join_pieces, split_shared
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.plan.document import Plan

WEIGHTS = "fp32"
"""The key of the float32 weights, beside the optimizer's own keys, such as `exp_avg`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A run of a flattened parameter in one DP rank's flat group."""

    dp_rank: int
    group: int
    start: int
    numel: int


class SavedJob:
    """A checkpoint that DeepSpeed wrote.

    Args:
        folder: the folder of one tag.
        plan: the plan of the job that was saved.
        dp_size: its number of DP ranks.
        zero_stage: its ZeRO stage: 1, 2 or 3.
    """

    def __init__(self, folder: Path, plan: Plan, dp_size: int, zero_stage: int) -> None:
        self.folder, self.plan, self.dp_size, self.zero_stage = folder, plan, dp_size, zero_stage
        self.parameters = {parameter.name: parameter for parameter in plan.expanded()}

    @functools.cached_property
    def engine_state(self) -> dict[str, Any]:
        """What is the same for all ranks: scheduler, counters, buffers; as the first rank saved it."""
        return self._model_states(0)

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state dict, with its hyperparameters, of the first rank."""
        return self._optimizer(0, 0)

    def keys(self, name: str) -> list[str]:
        """The float32 weights and the optimizer's states of the parameter `name`; none when it was frozen."""
        found = self._state_of(name)
        if found is None:
            return []
        states, weights = found
        return [WEIGHTS, *(key for key, value in states.items() if _is_flat(value, weights))]

    def scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps once for the flat group that the parameter `name` is in, such as `step`."""
        found = self._state_of(name)
        if found is None:
            return {}
        states, weights = found
        return {key: value for key, value in states.items() if not _is_flat(value, weights)}

    def shard(self, name: str, key: str, layout: Layout, tp_rank: int) -> Tensor:
        """The shard of the parameter `name` that `tp_rank` of another plan holds by `layout`, in the layout's view.

        Beside it, at most one saved rank's shard is in memory (the whole parameter, where the two views differ).
        """
        saved = self.plan.layouts[self.parameters[name].layout]
        wanted = layout.rank_intervals(tp_rank)
        if saved.dim is None:
            whole = self._held(name, key, 0)
        elif saved.shape == layout.shape and saved.dim == layout.dim:
            return self._collected(name, key, wanted)
        else:
            whole = self._collected(name, key, ((0, saved.shape[saved.dim]),))
        whole = whole.reshape(layout.shape)
        return whole if layout.dim is None else take(whole, wanted, layout.dim)

    def _collected(self, name: str, key: str, wanted: iv.Intervals) -> Tensor:
        """The indices `wanted` of the dimension that is cut, from the first rank that holds each."""
        layout = self.plan.layouts[self.parameters[name].layout]
        dim = layout.dim
        assert dim is not None
        shape = (*layout.shape[:dim], iv.length(wanted), *layout.shape[dim + 1 :])
        found = torch.empty(0)
        by_rank: dict[int, list[iv.Interval]] = {}
        for run, ranks in iv.holders(layout.intervals):
            if iv.copies((run,), wanted):
                by_rank.setdefault(ranks[0], []).append(run)
        for rank, held in by_rank.items():
            shard = self._held(name, key, rank).reshape(layout.rank_shape(rank))
            found = found if found.numel() else torch.empty(shape, dtype=shard.dtype)
            for run in held:
                for start, to, count in iv.copies((run,), wanted):
                    first = run[0] + start
                    for at, further, length in iv.copies(layout.intervals[rank], ((first, first + count),)):
                        found.narrow(dim, to + further, length).copy_(shard.narrow(dim, at, length))
        return found

    def _held(self, name: str, key: str, tp_rank: int) -> Tensor:
        """What `tp_rank` held of the parameter `name`."""
        parameter = self.parameters[name]
        layout, shape = self.plan.layouts[parameter.layout], self.plan.shape_of(parameter)
        owner, dot, leaf = name.rpartition(".")
        pieces = split_shared(leaf, layout, shape, tp_rank)
        held = []
        for piece in pieces:
            local = parameter_shape(piece.shape, piece.layout.shape, piece.layout.rank_shape(tp_rank))
            held.append(self._piece(owner + dot + piece.name, key, tp_rank).reshape(local))
        return join_pieces(pieces, held, layout, shape, tp_rank)

    def _piece(self, name: str, key: str, tp_rank: int) -> Tensor:
        fragments = self._fragments(tp_rank).get(name)
        if fragments is None:
            module: Mapping[str, Tensor] = self._model_states(tp_rank)["module"]
            return module[name].detach()
        parts = [
            self._flat(tp_rank, part.dp_rank, part.group, key).narrow(0, part.start, part.numel) for part in fragments
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _flat(self, tp_rank: int, dp_rank: int, group: int, key: str) -> Tensor:
        saved = self._optimizer(tp_rank, dp_rank)
        weights = SINGLE_PARTITION_OF_FP32_GROUPS if self.zero_stage < 3 else FP32_FLAT_GROUPS
        flat: Tensor = saved[weights][group] if key == WEIGHTS else self._states(saved)[group][key]
        return flat.detach()

    def _states(self, saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
        states: dict[int, dict[str, Any]] = saved[self.base_key]["state"]
        return states

    @property
    def base_key(self) -> str:
        """Where torch's optimizer is in the state dict of DeepSpeed's."""
        key: str = BASE_OPTIMIZER_STATE if self.zero_stage < 3 else OPTIMIZER_STATE_DICT
        return key

    def _state_of(self, name: str) -> tuple[dict[str, Any], Tensor] | None:
        """The states of the flat group that holds a part of the parameter, and that group's float32 weights."""
        owner, dot, leaf = name.rpartition(".")
        parameter = self.parameters[name]
        layout, shape = self.plan.layouts[parameter.layout], self.plan.shape_of(parameter)
        for piece in split_shared(leaf, layout, shape, 0):
            for part in self._fragments(0).get(owner + dot + piece.name, ()):
                if not part.numel:
                    continue
                states = self._states(self._optimizer(0, part.dp_rank)).get(part.group, {})
                return states, self._flat(0, part.dp_rank, part.group, WEIGHTS)
        return None

    @functools.cache  # noqa: B019 - a SavedJob lives as long as one load
    def _fragments(self, tp_rank: int) -> dict[str, list[Fragment]]:
        """Where the pieces of `tp_rank` lie, each in the order of its elements."""
        found: dict[str, list[Fragment]] = {}
        for dp_rank in range(self.dp_size):
            listed = self._stage_3(tp_rank, dp_rank) if self.zero_stage == 3 else self._stage_1_and_2(tp_rank, dp_rank)
            for name, fragment in listed:
                found.setdefault(name, []).append(fragment)
        return found

    def _stage_1_and_2(self, tp_rank: int, dp_rank: int) -> Iterator[tuple[str, Fragment]]:
        for group, mapping in enumerate(self._optimizer(tp_rank, dp_rank)[PARAM_SLICE_MAPPINGS]):
            for name, address in mapping.items():
                yield name, Fragment(dp_rank=dp_rank, group=group, start=address.start, numel=address.numel)

    def _stage_3(self, tp_rank: int, dp_rank: int) -> Iterator[tuple[str, Fragment]]:
        """Every parameter is cut into as many equal runs as there are DP ranks, the last ones padded."""
        for group, shapes in enumerate(self._model_states(tp_rank)[PARAM_SHAPES]):
            start = 0
            for name, shape in shapes.items():
                size = -(-shape.numel() // self.dp_size)
                numel = max(0, min(size, shape.numel() - dp_rank * size))
                yield name, Fragment(dp_rank=dp_rank, group=group, start=start, numel=numel)
                start += size

    def _model_states(self, tp_rank: int) -> dict[str, Any]:
        first = "zero_pp_rank_0_" if self.zero_stage == 3 else ""
        return self._load(f"{first}mp_rank_{tp_rank:02d}_model_states.pt")

    def _optimizer(self, tp_rank: int, dp_rank: int) -> dict[str, Any]:
        name = f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
        prefix = "" if (self.folder / name).exists() else "bf16_"
        state: dict[str, Any] = self._load(prefix + name)["optimizer_state_dict"]
        return state

    @functools.cache  # noqa: B019 - a SavedJob lives as long as one load
    def _load(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(
                Fault(
                    what="a file of the saved job cannot be read",
                    where=str(path),
                    got=str(error).splitlines()[0],
                    expected="what DeepSpeed wrote there",
                    next="resume from another tag",
                )
            ) from None
        return loaded


def _is_flat(value: Any, weights: Tensor) -> bool:
    """Whether an optimizer's state is one value per weight; padding may be left out on one side."""
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= weights.numel() > 0
