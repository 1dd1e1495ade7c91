"""How far the numbers of a sharded model are from those of the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.verify.float64_passes import Numbers
from autotp_plan.runtime.verify.report import FLOAT64_TOLERANCE
from autotp_plan.schemas.plan.document import Plan

Measure = Callable[[Tensor, Tensor], float]


def absolute_error(expected: Tensor, found: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number, or when the shapes differ."""
    if expected.shape != found.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    error = (expected.double() - found.double()).abs().max()
    return error.item() if torch.isfinite(error) else math.inf


def scaled_error(expected: Tensor, found: Tensor) -> float:
    """`absolute_error`, divided by the largest magnitude expected where that is above 1."""
    error = absolute_error(expected, found)
    if error == 0.0 or math.isinf(error):
        return error
    return error / max(1.0, expected.double().abs().max().item())


def errors(
    dense: Numbers, local: Numbers, plan: Plan, tp_rank: int, measure: Measure = scaled_error
) -> dict[str, dict[str, float]]:
    """The error of each of this rank's numbers against the dense model's.

    Args:
        dense: full tensors.
        local: at least the same kinds and names; of a sharded parameter this rank's shard.
        plan: says which part of a full tensor the rank holds.
        tp_rank: this rank's number in its tensor-parallel group.
        measure: the error of a tensor, given what is expected and what was found.

    Returns:
        kind -> pass or parameter -> error.
    """
    layouts = {parameter.name: plan.layouts[parameter.layout] for parameter in plan.expanded()}
    found: dict[str, dict[str, float]] = {kind: {} for kind in dense}
    for kind, expected in dense.items():
        for name, full in expected.items():
            layout = layouts.get(name)
            if layout is not None and layout.dim is not None:
                shard = take(full.reshape(layout.shape), layout.rank_intervals(tp_rank), layout.dim)
                found[kind][name] = measure(shard, local[kind][name].reshape(shard.shape))
            else:
                found[kind][name] = measure(full, local[kind][name])
    return found


def partial_gradients(dense: Numbers, local: Numbers, plan: Plan, group: Any) -> list[str]:
    """The replicated parameters of whose gradient each rank computed a part.

    Their gradients differ from the dense model's, but the sum of them over the ranks does not. A collective: every rank
    of `group` must call it.
    """
    found = []
    for parameter in plan.expanded():
        expected = dense["gradient"].get(parameter.name)
        if expected is None or plan.layouts[parameter.layout].dim is not None:
            continue
        mine = local["gradient"][parameter.name]
        summed = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        error = torch.tensor(scaled_error(expected, mine))
        dist.all_reduce(error, op=dist.ReduceOp.MAX, group=group)
        if error > FLOAT64_TOLERANCE >= scaled_error(expected, summed):
            found.append(parameter.name)
    return found
