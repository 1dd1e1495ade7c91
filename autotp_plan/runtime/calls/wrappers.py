"""What wraps a model for data parallelism, and would take a rank's shards for the full model.

DDP sends the first rank's shards to all others and averages the gradients of different shards; FSDP shards them a
second time; an engine that knows nothing of the TP size does as DDP. They are therefore refused when they are made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch.distributed
from accelerate import Accelerator
from deepspeed import DeepSpeedEngine, InferenceEngine
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from autotp_plan.runtime.deepspeed.internals import is_sharded, mark_as_sharded, tp_size_of_engine
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer
from autotp_plan.runtime.tensor_parallel.module_boundary import WithCollectives
from autotp_plan.runtime.tensor_parallel.torch_internals import FSDPParamGroup
from autotp_plan.schemas.errors import Fault, MismatchError

ADAPTED = "is_adapted_to_a_plan"
"""The attribute of an Accelerator that counts data-parallel ranks."""

_INSTEAD = (
    "plan.initialize(model, config=...); with Hugging Face's Trainer a DeepSpeed config and plan.adapt_trainer(trainer)"
    "; with Accelerate a DeepSpeedPlugin and plan.adapt_accelerator(accelerator)"
)


@functools.cache
def guard_wrappers() -> None:
    """From now on, the wrappers of this process refuse a sharded model, or a part of one.

    DDP over the ranks that hold the same shard is right, and so is a DeepSpeed engine for the plan's TP size. What is
    not sharded is wrapped as before.
    """
    check_first(DistributedDataParallel, _check_ddp)
    for cls in (FullyShardedDataParallel, DataParallel, InferenceEngine):
        check_first(cls, functools.partial(_refuse, cls))
    check_first(FSDPParamGroup, _check_fully_shard)
    check_first(DeepSpeedEngine, _check_engine)
    for method in ("prepare", "prepare_model"):
        check_first(Accelerator, _check_accelerator, method)


def check_first(cls: Any, check: Callable[[Mapping[str, Any]], None], method: str = "__init__") -> None:
    """Let a method of `cls` call `check` with its arguments, by name, before it does what it does.

    Args:
        cls: the class, which keeps the method from then on.
        check: raises an error where the call would be wrong.
        method: the method's name.
    """
    function = getattr(cls, method)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(signature.bind(self, *args, **kwargs).arguments)
        return function(self, *args, **kwargs)

    setattr(cls, method, checked)


def is_sharded_by_a_plan(module: Any) -> bool:
    """Whether `module` has a layer of which other ranks hold the rest."""
    if not isinstance(module, nn.Module):
        return False
    return any(
        part.is_tp_parallel if isinstance(part, PlannedLayer) else part.tp_boundary.shards.tp_world_size > 1
        for part in module.modules()
        if isinstance(part, (PlannedLayer, WithCollectives))
    )


def _ranks_of(module: nn.Module) -> Ranks | None:
    """The mesh of the model from `load_model` that is in `module`; None for a part of one."""
    found = (getattr(part, "autotp", None) for part in module.modules())
    return next((loaded.ranks for loaded in found if loaded is not None), None)


def _check_ddp(given: Mapping[str, Any]) -> None:
    if not is_sharded_by_a_plan(given["module"]):
        return
    group, mesh, ranks = given.get("process_group"), given.get("device_mesh"), _ranks_of(given["module"])
    if mesh is not None and mesh.ndim == 1:
        group = mesh.get_group()
    over = torch.distributed.get_process_group_ranks(group)
    if ranks is None:
        _fail("torch.nn.parallel.DistributedDataParallel", "a part of a sharded model", "the model", _INSTEAD)
    same_shard = torch.distributed.get_process_group_ranks(ranks.dp_group)
    if over != same_shard:
        _fail(
            "torch.nn.parallel.DistributedDataParallel", f"gradients averaged over the ranks {over}",
            f"over the ranks that hold the same shard: {same_shard}",
            f"DistributedDataParallel(model, process_group=plan.ranks.dp_group); or {_INSTEAD}",
        )  # fmt: skip


def _check_fully_shard(given: Mapping[str, Any]) -> None:
    if any(map(is_sharded_by_a_plan, given["modules"])):
        _fail("torch.distributed.fsdp.fully_shard", "a model that is sharded already", "a full model", _INSTEAD)


def _refuse(cls: type[Any], given: Mapping[str, Any]) -> None:
    module = given["model" if cls is InferenceEngine else "module"]
    if is_sharded_by_a_plan(module):
        instead = _INSTEAD if cls is not InferenceEngine else "model.eval() and model.generate(...), on every rank"
        _fail(f"{cls.__module__}.{cls.__qualname__}", "a model that is sharded already", "a full model", instead)


def _check_engine(given: Mapping[str, Any]) -> None:
    if not is_sharded_by_a_plan(given["model"]):
        return
    size, ranks = tp_size_of_engine(given), _ranks_of(given["model"])
    if ranks is None or size != ranks.tp_size:
        expected = f"tensor_parallel.autotp_size: {ranks.tp_size}" if ranks is not None else "the model"
        _fail("deepspeed.initialize", f"an engine for tensor_parallel.autotp_size: {size}", expected, _INSTEAD)
    if not is_sharded(given["model"]):
        mark_as_sharded(given["model"])  # a module around the model, as Lightning's


def _check_accelerator(given: Mapping[str, Any]) -> None:
    models = [*given.get("args", ()), given.get("model")]
    if any(map(is_sharded_by_a_plan, models)) and not getattr(given["self"], ADAPTED, False):
        _fail("accelerator.prepare", "an Accelerator that counts processes", "data-parallel ranks", _INSTEAD)


def _fail(where: str, got: str, expected: str, instead: str) -> NoReturn:
    raise MismatchError(
        Fault(
            what="a sharded model is wrapped by something that takes each rank's shards for the full model",
            where=where,
            got=got,
            expected=expected,
            next=instead,
        )
    )
