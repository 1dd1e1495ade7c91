"""Optimizer steps on full tensors: each TP rank steps some of the sharded weights in full, for all the others.

An optimizer that looks at a whole tensor is right when it is given one. Sharded weights are dealt out to the TP ranks.
In a step each rank is sent the other shards of its weight and of the gradient, lets the user's optimizer step this one
tensor, and sends back to each rank its shard of the result. So the state of an optimizer (the momentum of Muon) and the
work (Newton-Schulz) are divided among the ranks, and the numbers are those of the unsharded model whatever the
optimizer does. It does not know what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.optimizers.sharded_weights import ShardedWeight, largest_first
from autotp_plan.runtime.optimizers.step_alone import OneStep

Wave = Sequence[ShardedWeight]
"""Weights that are stepped at the same time, the nth by rank n: as many as there are ranks, or fewer."""

_SUB_PARAMETER = "sub_parameter_"
"""In the optimizer's state of a fused weight that is stepped in parts: the state of each, by number."""


class FullSteps:
    """The `step` of an optimizer of which some weights are stepped in full.

    Args:
        optimizer: the optimizer.
        weights: the weights that are stepped in full, at least one: the same on every TP rank. All tensors of one lie
            in one group of the optimizer.
        split_fused: step each sub-parameter of a fused weight by itself, with a state of its own.
    """

    def __init__(self, optimizer: Any, weights: Sequence[ShardedWeight], split_fused: bool = False) -> None:
        self._optimizer, self._split_fused = optimizer, split_fused
        self._step: Callable[[], Any] = optimizer.step
        self._group, self._tp_rank = weights[0].group, weights[0].tp_rank
        self._tp_size = len(weights[0].layout.intervals)
        self._waves = _waves(weights, self._tp_size)
        self._in_full = {id(tensor) for weight in weights for tensor in weight.tensors}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; every TP rank calls it. Argument and result are those of torch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        one_step = OneStep(self._optimizer, self._step)
        for wave in self._waves:
            self._step_wave(wave, one_step)
        groups = [group["params"] for group in self._optimizer.param_groups]
        rest = [[parameter for parameter in group if id(parameter) not in self._in_full] for group in groups]
        if any(rest):
            one_step.take(rest)
        one_step.end()
        return loss

    def _step_wave(self, wave: Wave, one_step: OneStep) -> None:
        mine = wave[self._tp_rank] if self._tp_rank < len(wave) else None
        sizes = [mine.shard_numel(rank) if mine is not None else 0 for rank in range(self._tp_size)]
        packed = [_packed(weight) for weight in wave]
        received = self._exchange(packed, [2 * size + 1 if mine is not None else 0 for size in sizes], packed[0])
        back: list[Tensor] = []
        if mine is not None:
            full = mine.full([part[:size] for part, size in zip(received, sizes)])
            if all(part[-1] for part in received):
                gradient = mine.full([part[size:-1] for part, size in zip(received, sizes)])
                full = self._stepped_weight(mine, full, gradient, one_step)
            back = [mine.shard_of(full, rank) for rank in range(self._tp_size)]
        shards = self._exchange(back, [weight.shard_numel(self._tp_rank) for weight in wave], packed[0])
        for weight, shard in zip(wave, shards):
            for tensor, part in zip(weight.tensors, weight.split(shard)):
                tensor.detach().copy_(part.view_as(tensor))

    def _exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Send the nth part to rank n; what each rank sent here, of the given sizes."""
        if self._tp_size == 1:
            return list(parts)
        given = [part.numel() for part in parts] + [0] * (self._tp_size - len(parts))
        taken = [*sizes, *[0] * (self._tp_size - len(sizes))]
        sent = torch.cat(list(parts)) if parts else like.new_empty(0)
        received = like.new_empty(sum(taken))
        dist.all_to_all_single(received, sent, taken, given, group=self._group)
        return list(torch.split(received, taken))

    def _stepped_weight(self, weight: ShardedWeight, full: Tensor, gradient: Tensor, one_step: OneStep) -> Tensor:
        parameter, state = weight.tensors[0], self._optimizer.state
        parts = weight.sub_parameters(full) if self._split_fused else [full]
        if len(parts) == 1:
            return self._stepped(parameter, full, gradient, one_step)
        before = dict(state.pop(parameter, {}))
        states = [before.pop(_SUB_PARAMETER + str(at), None) for at in range(len(parts))]
        stepped = []
        for at, (part, part_gradient) in enumerate(zip(parts, weight.sub_parameters(gradient))):
            if states[at] is not None or before:
                state[parameter] = dict(before) if states[at] is None else states[at]
            stepped.append(self._stepped(parameter, part, part_gradient, one_step))
            states[at] = state.pop(parameter, {})
        state[parameter] = {**before, **{_SUB_PARAMETER + str(at): one for at, one in enumerate(states)}}
        return weight.joined_sub_parameters(stepped)

    def _stepped(self, parameter: Tensor, full: Tensor, gradient: Tensor, one_step: OneStep) -> Tensor:
        """The full tensor after a step of the optimizer, with it in the place of the parameter that holds a shard."""
        shard, shard_gradient = parameter.data, parameter.grad
        groups = [group["params"] for group in self._optimizer.param_groups]
        parameter.grad = None
        parameter.data, parameter.grad = full, gradient
        try:
            one_step.take([[one for one in group if one is parameter] for group in groups])
            return parameter.data
        finally:
            parameter.grad = None
            parameter.data, parameter.grad = shard, shard_gradient


def _waves(weights: Sequence[ShardedWeight], tp_size: int) -> list[Wave]:
    """Weights of similar size and one dtype at a time, so that no rank waits long for another."""
    waves: list[list[ShardedWeight]] = []
    for weight in largest_first(weights):
        is_full = not waves or len(waves[-1]) == tp_size
        if is_full or waves[-1][0].tensors[0].dtype != weight.tensors[0].dtype:
            waves.append([])
        waves[-1].append(weight)
    return list(waves)


def _packed(weight: ShardedWeight) -> Tensor:
    """This rank's shard of a weight, of its gradient, and whether it has one."""
    value = weight.joined([tensor.detach() for tensor in weight.tensors])
    gradients = [tensor.grad for tensor in weight.tensors if tensor.grad is not None]
    has_gradient = len(gradients) == len(weight.tensors)
    gradient = weight.joined(gradients) if has_gradient else torch.zeros_like(value)
    return torch.cat([value, gradient, value.new_full((1,), float(has_gradient))])
