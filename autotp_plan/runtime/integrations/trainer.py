"""Hugging Face's Trainer with a model from `load_model`: what its Accelerator must know of tensor parallelism.

Trainer and Accelerate give all TP ranks of a data-parallel group the same batches once the DeepSpeed config says
`autotp_size`. But they count processes where they should count data-parallel ranks: in the engine's batch size, and in
the results of an evaluation, where a short last batch gets too small a weight and predictions are repeated. And they
would save a partly replicated parameter under two names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor

from autotp_plan.huggingface.internals import gathering_objects_with, prepare_engine_with
from autotp_plan.runtime.data.stream import check_not_split
from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.internals import is_sharded
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.tensor_parallel.partly_replicated import SHARED
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.upstream import replaced


def adapt_trainer(trainer: Any, plan: Plan, ranks: Ranks, initialize: Callable[..., Any]) -> None:
    """Let `trainer` count by data-parallel ranks, before it is run.

    Args:
        trainer: a transformers Trainer of any class, with a model from `TrainingPlan.load_model`.
        plan: the plan that the model was loaded by.
        ranks: this process's place in the mesh.
        initialize: `TrainingPlan.initialize`, which makes the engine.

    Raises:
        MismatchError: it does not run under DeepSpeed, is of another TP size, or its model was not loaded by a plan.
    """
    accelerator = trainer.accelerator
    _check(trainer, accelerator, ranks)
    plugin = accelerator.state.deepspeed_plugin
    wanted = engine_config(plugin.deepspeed_config, plan)
    for config in (plugin.deepspeed_config, trainer.args.hf_deepspeed_config.config):
        config["tensor_parallel"] = wanted["tensor_parallel"]
        zero = config.setdefault("zero_optimization", {})
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    _let_every_rank_read(trainer, accelerator, ranks)
    prepare_engine_with(accelerator, _as_accelerate_calls(initialize))
    accelerator.gather_for_metrics = _gather_once(accelerator, accelerator.gather_for_metrics, ranks)
    accelerator.get_state_dict = _without_partly_replicated(accelerator.get_state_dict)
    trainer.gather_function = functools.partial(
        accelerator.gather_for_metrics, use_gather_object=trainer.args.eval_use_gather_object
    )


def _check(trainer: Any, accelerator: Any, ranks: Ranks) -> None:
    if not is_sharded(trainer.model):
        raise MismatchError(
            Fault(
                what="the Trainer's model was not loaded by a plan",
                where="adapt_trainer(trainer)",
                got=type(trainer.model).__name__,
                expected="a model from plan.load_model",
                next="Trainer(model=plan.load_model(path), ...)",
            )
        )
    has_config = getattr(trainer.args, "hf_deepspeed_config", None) is not None
    if not has_config or accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise MismatchError(
            Fault(
                what="the Trainer does not run under DeepSpeed",
                where="TrainingArguments(deepspeed=...)",
                got=accelerator.distributed_type.value if has_config else "no DeepSpeed config",
                expected="a DeepSpeed config: anything else would average shards of different parts of the model",
                next='give TrainingArguments deepspeed="ds_config.json", or a dict',
            )
        )
    if accelerator.num_processes != ranks.tp_size * ranks.dp_size:
        raise MismatchError(
            Fault(
                what="Accelerate does not see the other processes",
                where="accelerator.num_processes",
                got=str(accelerator.num_processes),
                expected=str(ranks.tp_size * ranks.dp_size),
                next="TrainingArguments(use_cpu=True) on a machine without accelerators",
            )
        )


def _let_every_rank_read(trainer: Any, accelerator: Any, ranks: Ranks) -> None:
    """Let each rank read the data and keep its DP rank's share.

    Where one process reads for all (`dispatch_batches`, the default for a stream), Accelerate gives all ranks of a mesh
    with TP ranks the same batch, whatever their DP rank.
    """
    accelerator.dataloader_config.dispatch_batches = False
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for data in (trainer.train_dataset, *evaluated.values()):
        check_not_split(data, ranks, "Trainer(train_dataset=..., eval_dataset=...)", "leave out split_dataset_by_node")


def _as_accelerate_calls(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """`initialize` as Accelerate calls DeepSpeed's; DeepSpeed then counts data-parallel ranks."""

    def called_by_accelerate(*, model: Any, config_params: dict[str, Any], **options: Any) -> Any:
        config = {key: value for key, value in config_params.items() if key != "train_batch_size"}
        started = initialize(model, config=config, **options)
        config_params["train_batch_size"] = started[0].train_batch_size()
        return started

    return called_by_accelerate


def _gather_once(accelerator: Any, gather_for_metrics: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """`gather_for_metrics` with the results of each data-parallel rank once, not once per TP rank."""
    gather = accelerator.gather

    def first_of_each(gathered: Tensor) -> Tensor:
        by_rank = gathered.reshape(ranks.dp_size, ranks.tp_size, -1, *gathered.shape[1:])
        return by_rank[:, 0].reshape(-1, *gathered.shape[1:])

    def gather_tensors(data: Any) -> Any:
        return recursively_apply(first_of_each, gather(data))

    def of_first_tp_rank(gather_object: Callable[[Any], Any], data: Any) -> Any:
        return gather_object([] if ranks.tp_rank else data)

    def gather_for_metrics_once(input_data: Any, use_gather_object: bool = False) -> Any:
        with replaced(accelerator, "gather", gather_tensors), gathering_objects_with(of_first_tp_rank):
            return gather_for_metrics(input_data, use_gather_object)

    return gather_for_metrics_once


def _without_partly_replicated(get_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`get_state_dict` that refuses a model with partly replicated parameters, which it would save under two names."""

    def checked(model: Any, unwrap: bool = True) -> Any:
        for name, _ in model.module.named_parameters():
            if name.endswith(SHARED):
                raise MismatchError(
                    Fault(
                        what="a partly replicated parameter cannot be saved as a plain checkpoint",
                        where=name.removesuffix(SHARED),
                        got="two parameters: what this rank alone holds, and what other ranks hold too",
                        expected="KV heads that tp_size divides, for save_model of a fused weight",
                        next="set save_strategy='no' and use plan.save_checkpoint(trainer.deepspeed, folder)",
                    )
                )
        return get_state_dict(model, unwrap)

    return checked
