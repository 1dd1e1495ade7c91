"""Hugging Face's Trainer with a model from `load_model`: what its Accelerator must know of tensor parallelism.

Trainer and Accelerate give all TP ranks of a data-parallel group the same batches once the DeepSpeed config says
`autotp_size`. Three things they count by processes, not by data-parallel ranks, and without a word: the engine's batch
size, the results of an evaluation (a short last batch gets a smaller weight, and predictions come several times), and
whether the weights of a cut model can be saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import deepspeed
from accelerate import accelerator as accelerate
from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor

from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.tensor_parallel.partly_replicated import SHARED
from autotp_plan.schemas.errors import Fault, MismatchError

if TYPE_CHECKING:
    from autotp_plan.runtime.training_plan import TrainingPlan


def adapt_trainer(trainer: Any, plan: TrainingPlan) -> None:
    """Make `trainer`, a transformers Trainer of any class, count by data-parallel ranks. Before anything is run.

    Raises MismatchError when it does not run under DeepSpeed, is of another TP size, or its model is not the plan's.
    """
    accelerator = trainer.accelerator
    _check(trainer, accelerator, plan.ranks)
    plugin = accelerator.state.deepspeed_plugin
    wanted = engine_config(plugin.deepspeed_config, plan.document)
    for config in (plugin.deepspeed_config, trainer.args.hf_deepspeed_config.config):
        config["tensor_parallel"] = wanted["tensor_parallel"]
        zero = config.setdefault("zero_optimization", {})
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    accelerator._prepare_deepspeed = _prepare(accelerator, accelerator._prepare_deepspeed, plan)
    accelerator.gather_for_metrics = _gather_once(accelerator, accelerator.gather_for_metrics, plan.ranks)
    accelerator.get_state_dict = _whole_parameters(accelerator.get_state_dict)
    trainer.gather_function = functools.partial(
        accelerator.gather_for_metrics, use_gather_object=trainer.args.eval_use_gather_object
    )


def _check(trainer: Any, accelerator: Any, ranks: Ranks) -> None:
    if not getattr(trainer.model, "ds_autotp_parsed", False):
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


def _prepare(accelerator: Any, prepare: Callable[..., Any], plan: TrainingPlan) -> Callable[..., Any]:
    """Accelerate's way to an engine, by `plan.initialize`: DeepSpeed then counts data-parallel ranks."""
    initialize = deepspeed.initialize

    def start(*, model: Any, config_params: dict[str, Any], **options: Any) -> Any:
        config = {key: value for key, value in config_params.items() if key != "train_batch_size"}
        with patch.object(deepspeed, "initialize", initialize):
            started = plan.initialize(model, config=config, **options)
        config_params["train_batch_size"] = started[0].train_batch_size()
        return started

    def prepare_by_plan(*args: Any) -> Any:
        with patch.object(deepspeed, "initialize", start):
            return prepare(*args)

    return prepare_by_plan


def _gather_once(accelerator: Any, gather_for_metrics: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """`gather_for_metrics` with the results of each data-parallel rank once, not once per TP rank."""
    gather, gather_object = accelerator.gather, accelerate.gather_object

    def first_of_each(gathered: Tensor) -> Tensor:
        by_rank = gathered.reshape(ranks.dp_size, ranks.tp_size, -1, *gathered.shape[1:])
        return by_rank[:, 0].reshape(-1, *gathered.shape[1:])

    @contextmanager
    def once() -> Iterator[None]:
        tensors = patch.object(accelerator, "gather", lambda data: recursively_apply(first_of_each, gather(data)))
        objects = patch.object(accelerate, "gather_object", lambda data: gather_object([] if ranks.tp_rank else data))
        with tensors, objects:
            yield

    def gather_for_metrics_once(input_data: Any, use_gather_object: bool = False) -> Any:
        with once():
            return gather_for_metrics(input_data, use_gather_object)

    return gather_for_metrics_once


def _whole_parameters(get_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`get_state_dict` that refuses a model some of whose parameters are held as two."""

    def checked(model: Any, unwrap: bool = True) -> Any:
        for name, _ in model.module.named_parameters():
            if name.endswith(SHARED):
                raise MismatchError(
                    Fault(
                        what="a parameter that ranks share in part cannot be saved as a plain checkpoint",
                        where=name.removesuffix(SHARED),
                        got="two parameters: what is this rank's own, and what other ranks hold too",
                        expected="KV heads that tp_size divides, for save_model of a fused weight",
                        next="set save_strategy='no' and use plan.save_checkpoint(trainer.deepspeed, folder)",
                    )
                )
        return get_state_dict(model, unwrap)

    return checked
