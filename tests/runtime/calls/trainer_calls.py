"""Each method of Trainer that has to do with weights or counts, as a call that gives numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[Any, Path], Any]


def samples(count: int = 8) -> list[dict[str, Any]]:
    from tests.helpers.models import batch

    return [{"input_ids": (row := batch(seed)[0]), "labels": row.clone()} for seed in range(count)]


def make_trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from tests.helpers.trl import forget_accelerator

    forget_accelerator()
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        lr_scheduler_type="constant",
        deepspeed={"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
                   "zero_optimization": {"stage": 1}},
        **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=samples(), eval_dataset=samples(5))


def numbers(trainer: Any) -> list[Any]:
    """The losses and gradient norms of a training."""
    if not trainer.state.log_history:
        trainer.train()
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]


def metrics(found: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.endswith("loss")}


def predicted(trainer: Any) -> list[Any]:
    trainer.train()
    found = trainer.predict(samples(5))
    return [list(found.predictions.shape), float(abs(found.predictions).sum()), metrics(found.metrics)]


def first_batch(loader: Any) -> list[Any]:
    return [len(loader), next(iter(loader))["input_ids"].tolist()]


def one(trainer: Any) -> dict[str, Any]:
    return {key: torch.stack([row[key] for row in samples(2)]) for key in ("input_ids", "labels")}


def files(folder: Path) -> list[str]:
    """What the first rank wrote; every rank waits for it."""
    import torch.distributed

    torch.distributed.barrier()
    return sorted(path.name for path in Path(folder).iterdir() if path.is_file())


def rates(trainer: Any) -> list[Any]:
    trainer.train()
    return [trainer.get_learning_rates(), trainer.get_num_trainable_parameters(), trainer.state.total_flos]


def saved(folder: Path) -> list[float]:
    """The sums of squares of the tensors that the first rank saved; every rank waits for it."""
    import torch.distributed
    from safetensors.torch import load_file

    torch.distributed.barrier()
    tensors = [tensor.double() for _, tensor in sorted(load_file(folder / "model.safetensors").items())]
    return [tensor.square().sum().item() for tensor in tensors]


def pushed(trainer: Any, folder: Path) -> Any:
    """What is uploaded, by a Hub that is not there."""
    from types import SimpleNamespace

    import transformers.trainer

    uploaded: list[Any] = []
    hub = SimpleNamespace(
        create_repo=lambda *_, **__: SimpleNamespace(repo_id="a/model"),
        upload_folder=lambda folder_path, **_: uploaded.append(folder_path),
    )
    numbers(trainer)
    before = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: hub
    try:
        trainer.push_to_hub()
    finally:
        transformers.trainer.hf_api = before
    assert len(uploaded) == int(trainer.is_world_process_zero())
    return saved(folder)


def made_anew(trainer: Any, _: Path) -> list[Any]:
    model = trainer.model
    trainer.model_init = lambda: model
    return [trainer.call_model_init() is model, numbers(trainer)]


TRAINER: dict[str, Call] = {
    "train": lambda trainer, _: numbers(trainer),
    "evaluate": lambda trainer, _: [numbers(trainer), metrics(trainer.evaluate())],
    "predict": lambda trainer, _: predicted(trainer),
    "evaluation_loop": lambda trainer, _: [
        numbers(trainer),
        metrics(trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation").metrics),
    ],
    "prediction_step": lambda trainer, _: float(trainer.prediction_step(trainer.model, one(trainer), True)[0]),
    "compute_loss": lambda trainer, _: float(trainer.compute_loss(trainer.model, one(trainer)).detach()),
    "compute_loss: outputs": lambda trainer, _: float(
        trainer.compute_loss(trainer.model, one(trainer), return_outputs=True)[1].logits.detach().abs().sum()
    ),
    "get_train_dataloader": lambda trainer, _: first_batch(trainer.get_train_dataloader()),
    "get_eval_dataloader": lambda trainer, _: first_batch(trainer.get_eval_dataloader()),
    "get_test_dataloader": lambda trainer, _: first_batch(trainer.get_test_dataloader(samples(5))),
    "num_examples": lambda trainer, _: trainer.num_examples(trainer.get_train_dataloader()),
    "get_num_trainable_parameters": lambda trainer, _: trainer.get_num_trainable_parameters(),
    "floating_point_ops": lambda trainer, _: trainer.floating_point_ops(one(trainer)),
    "store_flos": lambda trainer, _: rates(trainer)[2],
    "get_learning_rates": lambda trainer, _: rates(trainer)[0],
    "get_decay_parameter_names": lambda trainer, _: sorted(trainer.get_decay_parameter_names(trainer.model)),
    "create_optimizer": lambda trainer, _: [len(group["params"]) for group in trainer.create_optimizer().param_groups],
    "create_optimizer_and_scheduler": lambda trainer, _: trainer.create_optimizer_and_scheduler(2),
    "create_scheduler": lambda trainer, _: type(trainer.create_scheduler(2, trainer.create_optimizer())).__name__,
    "get_optimizer_group": lambda trainer, _: [trainer.create_optimizer(), len(trainer.get_optimizer_group())][1],
    "get_optimizer_cls_and_kwargs": lambda trainer, _: trainer.get_optimizer_cls_and_kwargs(trainer.args)[0].__name__,
    "get_total_train_batch_size": lambda trainer, _: trainer.get_total_train_batch_size(trainer.args),
    "get_cp_size": lambda trainer, _: trainer.get_cp_size(),
    "get_sp_size": lambda trainer, _: trainer.get_sp_size(),
    "get_batch_samples": lambda trainer, _: int(
        trainer.get_batch_samples(iter([one(trainer)]), 1, torch.device("cpu"))[1]
    ),
    "save_state": lambda trainer, folder: [trainer.save_state(), files(folder)][1],
    "save_metrics": lambda trainer, folder: [trainer.save_metrics("all", {"a": 1.0}), files(folder)][1],
    "create_model_card": lambda trainer, folder: [trainer.create_model_card(), files(folder)][1],
    "hyperparameter_search": lambda trainer, _: trainer.hyperparameter_search(),
    "call_model_init": made_anew,
    "training_step": lambda trainer, _: numbers(trainer),
    "push_to_hub": pushed,
    "save_model": lambda trainer, folder: [
        numbers(trainer),
        trainer.save_model(str(folder / "saved")),
        saved(folder / "saved"),
    ],
    "create_accelerator_and_postprocess": lambda trainer, _: trainer.create_accelerator_and_postprocess(),
    "get_tp_size": lambda trainer, _: trainer.get_tp_size(),
}

CALLS = {"Trainer": TRAINER}
"""By section of docs/calls.md."""

TOGETHER = frozenset({
    "prediction_step", "compute_loss", "compute_loss: outputs", "get_train_dataloader", "get_eval_dataloader",
    "get_test_dataloader", "num_examples", "get_num_trainable_parameters", "floating_point_ops",
    "get_decay_parameter_names", "get_optimizer_cls_and_kwargs", "get_total_train_batch_size", "get_cp_size",
    "get_sp_size", "get_batch_samples", "get_tp_size", "hyperparameter_search",
})  # fmt: skip
"""Calls of one Trainer, one after the other."""
