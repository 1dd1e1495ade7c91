"""PEFT's calls on a sharded model that would count, merge or combine what one rank holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autotp_plan.runtime.calls.model_methods import full_sizes
from autotp_plan.runtime.calls.wrappers import check_first, is_sharded_by_a_plan
from autotp_plan.runtime.deepspeed.zero_internals import is_managed_by_zero3
from autotp_plan.runtime.tensor_parallel.gathered_weight import showing_shards
from autotp_plan.schemas.errors import Fault, MismatchError

_SUMS = ("linear", "cat")
"""How adapters may be combined: what is done to each factor is the same for a shard of it and for all of it."""


@functools.cache
def guard_calls() -> None:
    """From now on, PEFT's calls of this process count a sharded model, and refuse what would be wrong on one."""
    from peft import LoraModel, PeftModel

    for method in ("merge_and_unload", "merge_adapter", "unmerge_adapter", "add_weighted_adapter"):
        setattr(LoraModel, method, _with_shards(getattr(LoraModel, method)))
    check_first(LoraModel, _check_combination, "add_weighted_adapter")
    count: Any = PeftModel.get_nb_trainable_parameters

    @functools.wraps(count)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        if not is_sharded_by_a_plan(self):
            found: tuple[int, int] = count(self)
            return found
        sizes = [(parameter.requires_grad, size) for _, _, parameter, size in full_sizes(self)]
        return sum(size for is_trained, size in sizes if is_trained), sum(size for _, size in sizes)

    PeftModel.get_nb_trainable_parameters = get_nb_trainable_parameters


def _with_shards(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of PEFT's tuner, which on a sharded model sees each rank's shards of weights and factors."""

    @functools.wraps(method)
    def with_shards(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_not_partitioned(self.model, method.__name__)
        with showing_shards():
            return method(self, *args, **kwargs)

    return with_shards


def _check_not_partitioned(model: nn.Module, method: str) -> None:
    if is_sharded_by_a_plan(model) and any(map(is_managed_by_zero3, model.parameters())):
        raise MismatchError(
            Fault(
                what="adapters cannot be merged or combined where ZeRO 3 has partitioned the weights",
                where=f"model.{method}",
                got="a model of an engine with ZeRO 3, of whose weights each rank holds a part",
                expected="a model before plan.initialize, or an engine with ZeRO 0, 1 or 2",
                next="plan.save_adapter(engine, folder), and in a job without ZeRO 3 "
                "plan.load_adapter(plan.load_model(path), folder).merge_and_unload()",
            )
        )


def _check_combination(given: Mapping[str, Any]) -> None:
    kind = given.get("combination_type", "svd")
    if kind not in _SUMS and is_sharded_by_a_plan(given["self"].model):
        raise MismatchError(
            Fault(
                what="adapters of a sharded model cannot be combined in this way",
                where="model.add_weighted_adapter(combination_type=...)",
                got=repr(kind),
                expected=" or ".join(map(repr, _SUMS)) + ": others look at full matrices, or draw random numbers",
                next='add_weighted_adapter(..., combination_type="cat"), or combine them on an unsharded model',
            )
        )
