"""TRL's trainers: what must hold before one trains a sharded model, and what those that generate count.

A trainer that generates completions compares their rewards over processes: it takes the prompts of a step, gathers
rewards and keeps its own by the number of its process. With a sharded model a TP group is one such process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from deepspeed.utils import log_dist
from transformers import set_seed

from autotp_plan.huggingface.internals import counting_with, keep_rows_of
from autotp_plan.runtime.calls.wrappers import is_sharded_by_a_plan
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.integrations.accelerator import gather_of_each, objects_of_each
from autotp_plan.schemas.errors import Fault, MismatchError

_GENERATING = ("GRPOTrainer", "RLOOTrainer")
_RIGHT = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", *_GENERATING)
"""Those whose numbers were compared with the dense model's."""

_ALONE = {
    "use_vllm": "vLLM, which takes the weights of one process for the model",
    "use_transformers_continuous_batching": "a scheduler on each rank, which chooses its batches by itself",
    "rollout_func": "a rollout_func, which each TP rank would run by itself",
    "environment_factories": "an environment_factory, whose environments each TP rank would run by itself",
    "tools": "tools, which each TP rank would run by itself",
}
"""What a trainer that generates may be told, and what could then differ between the ranks of a TP group."""


def check_trl(trainer: Any, ranks: Ranks) -> None:
    """Raise MismatchError for a trainer of TRL that would count processes, or has another reference model.

    Args:
        trainer: a Trainer of any class.
        ranks: this process's place in the mesh.
    """
    base = _base_of(trainer)
    faults = [] if base is None or ranks.tp_size == 1 else list(_faults(trainer, base, ranks))
    if faults:
        raise MismatchError(faults)


def count_completions(trainer: Any, ranks: Ranks) -> None:
    """Let a trainer of TRL that generates count a TP group as one process; another trainer stays as it is.

    Each DP rank then draws what a process of the same number draws without sharding, its TP ranks the same, and the
    rewards of the group's first rank are those of all.

    Args:
        trainer: the trainer, whose Accelerator is adapted.
        ranks: this process's place in the mesh.
    """
    base = _base_of(trainer)
    if base is None or base.__name__ not in _GENERATING or ranks.tp_size == 1:
        return
    args, accelerator = trainer.args, trainer.accelerator
    args.generation_batch_size //= ranks.tp_size
    log_dist(
        f"{base.__name__} generates {args.generation_batch_size} completions at a time: "
        f"{args.per_device_train_batch_size} x steps_per_generation {args.steps_per_generation} for each of "
        f"{ranks.dp_size} data-parallel ranks",
        [0],
    )
    keep_rows_of(trainer, args.generation_batch_size)
    set_seed(args.seed + ranks.dp_rank)  # TRL has added the number of the process
    counting = functools.partial(
        counting_with,
        accelerator,
        sys.modules[base.__module__],
        ranks.dp_size,
        ranks.dp_rank,
        gather_of_each(accelerator, ranks),
        objects_of_each(ranks),
    )
    for name in ("training_step", "prediction_step"):
        setattr(trainer, name, _inside(counting, getattr(trainer, name)))


def _inside(context: Any, function: Any) -> Any:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return called


def _base_of(trainer: Any) -> type | None:
    """The class of TRL that `trainer` is of, None where there is none."""
    return next((cls for cls in type(trainer).__mro__ if _is_of_trl(cls)), None)


def _is_of_trl(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "trl" and cls.__name__.endswith("Trainer")


def _faults(trainer: Any, base: type, ranks: Ranks) -> Iterator[Fault]:
    name = base.__name__
    if name not in _RIGHT or ".experimental." in base.__module__:
        yield Fault(
            what="this trainer of TRL is not known to be right on a sharded model",
            where=f"adapt_trainer({name})",
            got="rewards, samples and generated text that may be counted once for each process, not for each DP rank",
            expected=" or ".join(sorted(_RIGHT)),
            next=f"train with {name} on a model that is not sharded (tp_size 1)",
        )
    elif name in _GENERATING:
        yield from _generation_faults(trainer, name, ranks)
    else:
        yield from _reference_faults(trainer, name, ranks)


def _reference_faults(trainer: Any, name: str, ranks: Ranks) -> Iterator[Fault]:
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and not is_sharded_by_a_plan(reference):
        yield Fault(
            what="the reference model is not sharded",
            where=f"{name}(ref_model=...)",
            got="the full model on every rank",
            expected="a second model from plan.load_model, in a DeepSpeed config that says autotp_size",
            next=f"{name}(model, ref_model=plan.load_model(path), ...) with deepspeed={{..., "
            f'"tensor_parallel": {{"autotp_size": {ranks.tp_size}}}}}',
        )


def _generation_faults(trainer: Any, name: str, ranks: Ranks) -> Iterator[Fault]:
    for option, got in _ALONE.items():
        if getattr(trainer, option, None):
            yield Fault(
                what="this way to completions is not known to be right on a sharded model",
                where=f"{name}: {option}",
                got=got,
                expected="model.generate, whose tokens are the same on all ranks of a TP group",
                next="leave it out",
            )
    args = trainer.args
    completions = args.per_device_train_batch_size * args.steps_per_generation * ranks.dp_size
    if completions % trainer.num_generations:
        yield Fault(
            what="the completions of a step are no full groups",
            where=f"{name}: num_generations",
            got=f"{completions} completions: per_device_train_batch_size {args.per_device_train_batch_size} x "
            f"steps_per_generation {args.steps_per_generation} x {ranks.dp_size} data-parallel ranks",
            expected=f"a multiple of num_generations, {trainer.num_generations}",
            next=f"steps_per_generation={trainer.num_generations}, or another per_device_train_batch_size",
        )
    if args.eval_strategy != "no" and args.per_device_eval_batch_size * ranks.dp_size % trainer.num_generations_eval:
        yield Fault(
            what="the completions of an evaluation step are no full groups",
            where=f"{name}: num_generations_eval",
            got=f"per_device_eval_batch_size {args.per_device_eval_batch_size} x {ranks.dp_size} data-parallel ranks",
            expected=f"a multiple of num_generations_eval, {trainer.num_generations_eval}",
            next=f"per_device_eval_batch_size={trainer.num_generations_eval}",
        )
    models: list[tuple[str, Any]] = [("ref_model", trainer.ref_model)]
    models += [(f"reward_funcs[{place}]", one) for place, one in enumerate(trainer.reward_funcs)]
    for title, model in models:
        if hasattr(model, "autotp_size") and model.autotp_size() > 1 and not is_sharded_by_a_plan(model):
            yield Fault(
                what="DeepSpeed has sharded a model that TRL loaded, by names and not by a plan",
                where=f"{name}: {title}",
                got=f"tensor_parallel.autotp_size: {model.autotp_size()} in the DeepSpeed config",
                expected="the full model on each rank",
                next="leave tensor_parallel out of the DeepSpeed config: plan.adapt_trainer adds it; and make this "
                "trainer before the first engine of the process",
            )
