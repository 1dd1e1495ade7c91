"""Hugging Face's Trainer with a model from `load_model`.

Trainer counts by its Accelerator, and gathers the results of an evaluation with it. Where that counted processes and
not data-parallel ranks, a short last batch would get too small a weight, and predictions would be repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from accelerate.utils import DistributedType

from autotp_plan.huggingface.internals import count_items_of_one_rank, count_tokens_with
from autotp_plan.runtime.data.stream import check_not_split
from autotp_plan.runtime.deepspeed.internals import is_sharded
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.integrations.accelerator import adapt_accelerator, gather_of_each, on_every_rank
from autotp_plan.runtime.integrations.trl import check_trl, count_completions
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan


def adapt_trainer(trainer: Any, plan: Plan, ranks: Ranks, initialize: Callable[..., Any]) -> None:
    """Let `trainer` count by data-parallel ranks, before it is run.

    Args:
        trainer: a transformers Trainer of any class, with a model from `TrainingPlan.load_model`.
        plan: the plan that the model was loaded by.
        ranks: this process's place in the mesh.
        initialize: `TrainingPlan.initialize`, which makes the engine.

    Raises:
        MismatchError: it does not run under DeepSpeed, is of another TP size, or its model was not loaded by a plan;
            or it is a trainer of TRL that would be wrong.
    """
    accelerator = trainer.accelerator
    _check(trainer, accelerator)
    check_trl(trainer, ranks)
    _check_data(trainer, ranks)
    config = trainer.args.hf_deepspeed_config.config
    config["tensor_parallel"] = adapt_accelerator(accelerator, plan, ranks, initialize)
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    _count_the_model(trainer, ranks)
    trainer.hyperparameter_search = _refuse_search
    for method in ("evaluate", "predict"):
        on_every_rank(trainer, method, f"trainer.{method}")
    count_tokens_with(trainer, gather_of_each(accelerator, ranks))
    count_items_of_one_rank(trainer, ranks.tp_size)
    count_completions(trainer, ranks)
    trainer.gather_function = functools.partial(
        accelerator.gather_for_metrics, use_gather_object=trainer.args.eval_use_gather_object
    )


def _check(trainer: Any, accelerator: Any) -> None:
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


def _count_the_model(trainer: Any, ranks: Ranks) -> None:
    """Let it count the parameters of the model, and each rank its part of the floating-point operations.

    Trainer adds the operations of all ranks.
    """
    count = type(trainer).floating_point_ops
    trainer.floating_point_ops = lambda inputs: count(trainer, inputs) // ranks.tp_size
    if hasattr(trainer.model, "num_parameters"):
        trainer.get_num_trainable_parameters = lambda: trainer.model.num_parameters(only_trainable=True)


def _refuse_search(*_: Any, **__: Any) -> NoReturn:
    raise MismatchError(
        Fault(
            what="a Trainer with a sharded model cannot search hyperparameters",
            where="trainer.hyperparameter_search",
            got="an Accelerator for each trial, which counts processes",
            expected="one that plan.adapt_trainer has seen",
            next="start a job for each choice of hyperparameters, with trainer.train()",
        )
    )


def _check_data(trainer: Any, ranks: Ranks) -> None:
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for data in (trainer.train_dataset, *evaluated.values()):
        check_not_split(data, ranks, "Trainer(train_dataset=..., eval_dataset=...)", "leave out split_dataset_by_node")
