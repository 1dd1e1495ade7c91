"""The norm of all gradients for a user's own clipping: `torch.nn.utils.clip_grad_norm_` on a sharded model.

torch takes the norm of the gradients it is given. Those of a sharded model are parts, so the norms of the TP ranks are
put together here, and what several ranks hold is counted once. Tensors of any other model are left to torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.parameters.shard_registry import shards_by_gradient
from autotp_plan.runtime.tensor_parallel.torch_internals import replace_total_norm_function, total_norm_function
from autotp_plan.schemas.errors import Fault, OptionError


def use_global_norm() -> None:
    """From now on `clip_grad_norm_` and `get_total_norm` of torch see all shards of a sharded model's gradients."""
    function = total_norm_function()
    if not hasattr(function, "of_one_rank"):
        replace_total_norm_function(_over_ranks(function))


def _over_ranks(of_one_rank: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`of_one_rank`, torch's function, for gradients of which some are shards; every TP rank calls it then."""

    @functools.wraps(of_one_rank)
    @torch.no_grad()
    def total_norm(
        tensors: Tensor | Iterable[Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        shards = shards_by_gradient(gradients)
        if not shards:
            return of_one_rank(gradients, norm_type, error_if_nonfinite, foreach)
        some = next(iter(shards.values()))
        counted = [
            gradient
            for gradient in gradients
            if (shards[id(gradient)].is_counted if id(gradient) in shards else some.tp_rank == 0)
        ]
        norm = of_one_rank(counted, norm_type, False, foreach).to(gradients[0].device)
        total = _sum_of_norms(norm, float(norm_type), some.group)
        if error_if_nonfinite and not total.isfinite():
            of_one_rank([total], norm_type, True, foreach)  # raises torch's own error
        return total

    total_norm.of_one_rank = of_one_rank  # type: ignore[attr-defined]
    return total_norm


def _sum_of_norms(norm: Tensor, order: float, group: Any) -> Tensor:
    """The norm of the concatenation of vectors of which each rank has the norm of one."""
    if order <= 0:
        raise OptionError(
            Fault(
                code="norm-order",
                what="the norm of a sharded model's gradients is there for positive orders",
                where="norm_type",
                got=str(order),
                expected="a positive number, or inf",
                next="norm_type=2.0, or norm_type=math.inf",
            )
        )
    if order == math.inf:
        largest = norm.double().nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return largest.to(norm.dtype)
    power = norm.double().pow(order)
    dist.all_reduce(power, group=group)
    return power.pow(1 / order).to(norm.dtype)
