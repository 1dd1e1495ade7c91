"""What DeepSpeed saved of a job under ZeRO 1, 2 or 3, parameter by parameter, to resume on a different mesh.

Every file of a job belongs to one TP rank and one DP rank: ZeRO gives each DP rank a range of the elements of what the
TP rank holds (`partly_replicated`). They are pickles, as DeepSpeed writes them, of which only data is read
(`job_files.read_saved`). Of their tensors only those elements are read that are asked for, and they are not mapped: a
disk that fails, or a file that is shortened, would end the process by a signal, or give zeros.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.deepspeed.job_files import read_saved, unreadable
from autotp_plan.runtime.deepspeed.zero_internals import (
    SavedOptimizer,
    model_states_file,
    optimizer_states_files,
    trainable_shapes,
)
from autotp_plan.runtime.parameters.partly_replicated import HeldParameter, held_parameters, join_held
from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.tensor_parallel.torch_internals import map_tensors, position_in_file, says_where_tensors_lie
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.files import ByteRange, Reader

WEIGHTS = "fp32"
"""The key of the float32 weights, next to the optimizer's keys, such as `exp_avg`."""
_SMALL_BYTES = 4096
"""A tensor of so many bytes is read with the rest of its file: `step`, say, and the other scalars of an optimizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRange:
    """Consecutive elements of a flattened parameter in one DP rank's flat group."""

    dp_rank: int
    group: int
    at: int
    numel: int


class SavedJob:
    """A checkpoint that DeepSpeed wrote.

    Args:
        folder: the folder of one tag.
        plan: the plan of the job that was saved.
        dp_size: its number of DP ranks.
        zero_stage: its ZeRO stage: 1, 2 or 3.
        trust: unpickle its files, whatever they hold. They are mapped then.
    """

    def __init__(self, folder: Path, plan: Plan, dp_size: int, zero_stage: int, trust: bool = False) -> None:
        self.trust = trust
        self.folder, self.plan, self.dp_size, self.zero_stage = folder, plan, dp_size, zero_stage
        self.parameters = {parameter.name: parameter for parameter in plan.expanded()}

    def check(self) -> None:
        """Check that the saved flat groups hold every trainable parameter once. Opens every file of the job.

        Raises:
            CheckpointError: a file cannot be read, or an element is missing or there twice.
        """
        for tp_rank in range(self.plan.tp_size):
            faults = list(self._faults(tp_rank))
            if faults:
                raise CheckpointError(faults)

    @functools.cached_property
    def engine_state(self) -> dict[str, Any]:
        """What is the same for all ranks (scheduler, counters, client state), as the first rank saved it."""
        states = self._model_states(0)
        name = model_states_file(self.zero_stage, 0)
        rest = {key: value for key, value in states.items() if key != "module"}
        in_memory: dict[str, Any] = map_tensors(Tensor, lambda tensor: self._read(name, tensor), rest)
        return in_memory

    def buffer(self, name: str) -> Tensor | None:
        """A buffer that the first rank saved, and that is no parameter of the plan; None where it saved none."""
        found = self._model_states(0)["module"].get(name)
        return None if found is None else self._read(model_states_file(self.zero_stage, 0), found)

    @property
    def optimizer_state(self) -> SavedOptimizer:
        """The optimizer's state of the first rank, with its hyperparameters. Its weights are not in memory."""
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
        """The shard of the parameter `name` that `tp_rank` of another plan holds by `layout`.

        Of what was saved, at most one rank's shard is in memory (the full parameter, where the plans shard it in
        different shapes).

        Args:
            name: a parameter of the plan.
            key: `fp32` for the weights, or a key of the optimizer such as `exp_avg`.
            layout: the layout of the parameter in the other plan.
            tp_rank: a rank of the other plan.

        Returns:
            The shard, of shape `layout.rank_shape(tp_rank)`.
        """
        saved = self.plan.layouts[self.parameters[name].layout]
        wanted = layout.rank_intervals(tp_rank)
        if saved.dim is None:
            full = self._held(name, key, 0)
        elif saved.shape == layout.shape and saved.dim == layout.dim:
            return self._collected(name, key, wanted)
        else:
            full = self._collected(name, key, ((0, saved.shape[saved.dim]),))
        full = full.reshape(layout.shape)
        return full if layout.dim is None else take(full, wanted, layout.dim)

    def _collected(self, name: str, key: str, wanted: iv.Intervals) -> Tensor:
        """The indices `wanted` of the sharded dimension, each from the first rank that holds it."""
        layout = self.plan.layouts[self.parameters[name].layout]
        dim = layout.dim
        assert dim is not None
        shape = (*layout.shape[:dim], iv.length(wanted), *layout.shape[dim + 1 :])
        found = torch.empty(0)
        by_rank: dict[int, list[iv.Interval]] = {}
        for interval, ranks in iv.holders(layout.intervals):
            if iv.copies((interval,), wanted):
                by_rank.setdefault(ranks[0], []).append(interval)
        for rank, held in by_rank.items():
            shard = self._held(name, key, rank).reshape(layout.rank_shape(rank))
            found = found if found.numel() else torch.empty(shape, dtype=shard.dtype)
            for interval in held:
                for start, to, count in iv.copies((interval,), wanted):
                    first = interval[0] + start
                    for at, further, length in iv.copies(layout.intervals[rank], ((first, first + count),)):
                        found.narrow(dim, to + further, length).copy_(shard.narrow(dim, at, length))
        return found

    def _held(self, name: str, key: str, tp_rank: int) -> Tensor:
        """What `tp_rank` held of the parameter `name`."""
        parameter = self.parameters[name]
        layout, shape = self.plan.layouts[parameter.layout], self.plan.shape_of(parameter)
        held = self._held_parameters(name, tp_rank)
        tensors = []
        for one in held:
            local = parameter_shape(one.shape, one.layout.shape, one.layout.rank_shape(tp_rank))
            tensors.append(self._elements(one.name, key, tp_rank).reshape(local))
        return join_held(held, tensors, layout, shape, tp_rank)

    def _held_parameters(self, name: str, tp_rank: int) -> tuple[HeldParameter, ...]:
        parameter = self.parameters[name]
        return held_parameters(name, self.plan.layouts[parameter.layout], self.plan.shape_of(parameter), tp_rank)

    def _elements(self, name: str, key: str, tp_rank: int) -> Tensor:
        """The elements of a parameter as the module of `tp_rank` named it, from all DP ranks."""
        ranges = self._ranges(tp_rank).get(name)
        if ranges is None:  # frozen, or a buffer
            module: Mapping[str, Tensor] = self._model_states(tp_rank)["module"]
            return self._read(model_states_file(self.zero_stage, tp_rank), module[name])
        parts = [
            self._read(
                self._optimizer_file(tp_rank, one.dp_rank),
                self._flat(tp_rank, one.dp_rank, one.group, key).narrow(0, one.at, one.numel),
            )
            for one in ranges
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _flat(self, tp_rank: int, dp_rank: int, group: int, key: str) -> Tensor:
        saved = self._optimizer(tp_rank, dp_rank)
        flat: Tensor = saved.flat_groups[group] if key == WEIGHTS else saved.states[group][key]
        return flat.detach()

    def _state_of(self, name: str) -> tuple[dict[str, Any], Tensor] | None:
        """The states of the flat group that holds a part of the parameter, and that group's float32 weights."""
        for held in self._held_parameters(name, 0):
            for one in self._ranges(0).get(held.name, ()):
                if not one.numel:
                    continue
                states = self._optimizer(0, one.dp_rank).states.get(one.group, {})
                return states, self._flat(0, one.dp_rank, one.group, WEIGHTS)
        return None

    @functools.cache  # noqa: B019 - a SavedJob lives as long as one load
    def _ranges(self, tp_rank: int) -> dict[str, list[SavedRange]]:
        """Where the trainable parameters of `tp_rank` lie, each in the order of its elements."""
        found: dict[str, list[SavedRange]] = {}
        for dp_rank in range(self.dp_size):
            listed = self._stage_3(tp_rank, dp_rank) if self.zero_stage == 3 else self._stage_1_and_2(tp_rank, dp_rank)
            for name, one in listed:
                found.setdefault(name, []).append(one)
        return found

    def _stage_1_and_2(self, tp_rank: int, dp_rank: int) -> Iterator[tuple[str, SavedRange]]:
        for name, group, at, numel in self._optimizer(tp_rank, dp_rank).addresses():
            yield name, SavedRange(dp_rank=dp_rank, group=group, at=at, numel=numel)

    def _stage_3(self, tp_rank: int, dp_rank: int) -> Iterator[tuple[str, SavedRange]]:
        """Every parameter is divided into equal ranges, one for each DP rank, the last ones padded."""
        for group, shapes in enumerate(trainable_shapes(self._model_states(tp_rank))):
            at = 0
            for name, shape in shapes.items():
                size = -(-math.prod(shape) // self.dp_size)
                numel = max(0, min(size, math.prod(shape) - dp_rank * size))
                yield name, SavedRange(dp_rank=dp_rank, group=group, at=at, numel=numel)
                at += size

    def _faults(self, tp_rank: int) -> Iterator[Fault]:
        """Trainable parameters of which elements are missing, and ranges that overlap or lie outside of their group."""
        ranges = self._ranges(tp_rank)
        for shapes in trainable_shapes(self._model_states(tp_rank)):
            for name, shape in shapes.items():
                numel = sum(one.numel for one in ranges.get(name, ()))
                if numel != math.prod(shape):
                    yield self._fault(name, f"{numel} elements", f"{math.prod(shape)} elements")
        by_group: dict[tuple[int, int], list[iv.Interval]] = defaultdict(list)
        for held in ranges.values():
            for one in held:
                if one.numel:
                    by_group[one.dp_rank, one.group].append((one.at, one.at + one.numel))
        for (dp_rank, group), intervals in sorted(by_group.items()):
            where = f"flat group {group} of TP rank {tp_rank}, DP rank {dp_rank}"
            intervals.sort()
            if any(stop > start for (_, stop), (start, _) in zip(intervals, intervals[1:])):
                yield self._fault(where, "elements that two parameters hold", "each element once")
            size = self._flat(tp_rank, dp_rank, group, WEIGHTS).numel()
            if intervals[-1][1] > size:
                yield self._fault(where, f"{size} elements", f"at least {intervals[-1][1]} elements")

    def _fault(self, where: str, got: str, expected: str) -> Fault:
        return Fault(
            what="the saved flat groups of ZeRO do not hold the weights where they were looked for",
            where=f"{self.folder}: {where}",
            got=got,
            expected=expected,
            next="resume on the mesh and ZeRO stage the job was saved on, or from another tag",
        )

    def _model_states(self, tp_rank: int) -> dict[str, Any]:
        return self._load(model_states_file(self.zero_stage, tp_rank))

    def _optimizer(self, tp_rank: int, dp_rank: int) -> SavedOptimizer:
        return SavedOptimizer.of_file(self._load(self._optimizer_file(tp_rank, dp_rank)), self.zero_stage)

    def _optimizer_file(self, tp_rank: int, dp_rank: int) -> str:
        names = optimizer_states_files(tp_rank, dp_rank)
        return next((name for name in names if (self.folder / name).exists()), names[0])

    @functools.cache  # noqa: B019 - a SavedJob lives as long as one load
    def _load(self, name: str) -> dict[str, Any]:
        """What a file holds, of its larger tensors the place alone; they are mapped where torch does not say that."""
        if self.trust or not says_where_tensors_lie():
            mapped: dict[str, Any] = read_saved(self.folder / name, trust=self.trust, mmap=True)
            return mapped
        placed = read_saved(self.folder / name, trust=False, map_location="meta")

        def small(tensor: Tensor) -> Tensor:
            return self._read(name, tensor) if tensor.nbytes <= _SMALL_BYTES else tensor

        loaded: dict[str, Any] = map_tensors(Tensor, small, placed)
        return loaded

    def _read(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that `_load` found in the file `name`, or a part of one, in memory.

        Raises:
            CheckpointError: the file cannot be read, or was shortened meanwhile.
        """
        tensor = tensor.detach()
        if not tensor.is_meta or not tensor.numel():
            return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
        path = self.folder / name
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        found = torch.empty(span, dtype=tensor.dtype)
        memory = memoryview(found.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with Reader() as reader:
                reader.read_into(memory, [ByteRange(path, position_in_file(tensor), len(memory))])
        except (OSError, EOFError) as error:
            raise CheckpointError(unreadable(path, error)) from None
        return found.as_strided(tensor.shape, tensor.stride())


def _is_flat(value: Any, weights: Tensor) -> bool:
    """Whether an optimizer's state is one value per weight; padding may be left out on one side."""
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= weights.numel() > 0
