"""Accelerate with a model from `load_model`: what its Accelerator must know of tensor parallelism.

Accelerate gives all TP ranks of a data-parallel group the same batches once the DeepSpeed config says `autotp_size`.
But it counts processes where it should count data-parallel ranks: in the engine's batch size, and in what it gathers
for metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor

from autotp_plan.huggingface.internals import gathering_objects_with, prepare_engine_with
from autotp_plan.runtime.calls.wrappers import ADAPTED
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.upstream import replaced

_ON_CPU = (
    "on a machine without accelerators call PartialState(cpu=True) first, and Accelerator without cpu=True; "
    "of a Trainer, TrainingArguments(use_cpu=True)"
)


def adapt_accelerator(accelerator: Any, plan: Plan, ranks: Ranks, initialize: Callable[..., Any]) -> dict[str, Any]:
    """Let `accelerator` count by data-parallel ranks, before its `prepare` is called.

    Args:
        accelerator: an `accelerate.Accelerator` with a DeepSpeed plugin.
        plan: the plan that the model is loaded by.
        ranks: this process's place in the mesh.
        initialize: `TrainingPlan.initialize`, which makes the engine.

    Returns:
        The `tensor_parallel` section that its DeepSpeed config has now.

    Raises:
        MismatchError: it does not run under DeepSpeed, or is of another TP size.
    """
    _check(accelerator, ranks)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["tensor_parallel"] = engine_config(config, plan)["tensor_parallel"]
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    accelerator.dataloader_config.dispatch_batches = False  # or it would give all DP ranks what one process reads
    prepare_engine_with(accelerator, _as_accelerate_calls(initialize))
    accelerator.gather_for_metrics = _gather_once(accelerator, accelerator.gather_for_metrics, ranks)
    setattr(accelerator, ADAPTED, True)
    on_every_rank(accelerator, "prepare", "accelerator.prepare, which trainer.get_eval_dataloader calls too")
    section: dict[str, Any] = config["tensor_parallel"]
    return section


def on_every_rank(owner: Any, method: str, call: str) -> None:
    """Let a method of `owner`, an object, check first that all ranks call it; `call` is its name for people."""
    function = getattr(owner, method)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_all_call(call)
        return function(*args, **kwargs)

    setattr(owner, method, checked)


def _check(accelerator: Any, ranks: Ranks) -> None:
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise MismatchError(
            Fault(
                what="Accelerate does not run under DeepSpeed",
                where="Accelerator(deepspeed_plugin=...), or TrainingArguments(deepspeed=...)",
                got=accelerator.distributed_type.value,
                expected="a DeepSpeed config: anything else would average shards of different parts of the model",
                next=f"Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)); {_ON_CPU}",
            )
        )
    if accelerator.num_processes != ranks.tp_size * ranks.dp_size:
        raise MismatchError(
            Fault(
                what="Accelerate does not see the other processes",
                where="accelerator.num_processes",
                got=str(accelerator.num_processes),
                expected=str(ranks.tp_size * ranks.dp_size),
                next=_ON_CPU,
            )
        )


def _as_accelerate_calls(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """`initialize` as Accelerate calls DeepSpeed's; DeepSpeed then counts data-parallel ranks."""

    def called_by_accelerate(*, model: Any, config_params: dict[str, Any], **options: Any) -> Any:
        config = {key: value for key, value in config_params.items() if key != "train_batch_size"}
        started = initialize(model, config=config, **options)
        config_params["train_batch_size"] = started[0].train_batch_size()
        return started

    return called_by_accelerate


def gather_of_each(accelerator: Any, ranks: Ranks) -> Callable[[Any], Any]:
    """`accelerator.gather` with the tensors of each data-parallel rank once, not once per TP rank.

    Args:
        accelerator: the Accelerator.
        ranks: this process's place in the mesh.
    """
    gather = accelerator.gather

    def first_of_each(gathered: Tensor) -> Tensor:
        by_rank = gathered.reshape(ranks.dp_size, ranks.tp_size, -1, *gathered.shape[1:])
        return by_rank[:, 0].reshape(-1, *gathered.shape[1:])

    return lambda data: recursively_apply(first_of_each, gather(data))


def objects_of_each(ranks: Ranks) -> Callable[[Callable[[Any], Any], Any], Any]:
    """`gather_object(objects)`, given both, with the objects of each data-parallel rank once."""
    return lambda gather_object, objects: gather_object([] if ranks.tp_rank else objects)


def _gather_once(accelerator: Any, gather_for_metrics: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """`gather_for_metrics` with the results of each data-parallel rank once, not once per TP rank."""
    gather_tensors = gather_of_each(accelerator, ranks)

    def gather_for_metrics_once(input_data: Any, use_gather_object: bool = False) -> Any:
        with replaced(accelerator, "gather", gather_tensors), gathering_objects_with(objects_of_each(ranks)):
            return gather_for_metrics(input_data, use_gather_object)

    return gather_for_metrics_once
