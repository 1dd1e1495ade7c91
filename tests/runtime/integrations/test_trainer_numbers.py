"""Numbers that Trainer logs, next to those of the unsharded model on as many data-parallel ranks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launch import launch

STEPS, LENGTH = 3, 12
NAMES = ("loss", "learning_rate", "epoch", "num_input_tokens_seen", "train_tokens_per_second", "total_flos",
         "train_samples_per_second")  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "all": {"include_num_input_tokens_seen": "all"},
    "non_padding": {"include_num_input_tokens_seen": "non_padding"},
    "by length": {"train_sampling_strategy": "group_by_length", "include_num_input_tokens_seen": "non_padding"},
    "not averaged": {"average_tokens_across_devices": False},
    "accumulated": {"gradient_accumulation_steps": 2},
    "Adafactor": {"optim": "adafactor"},
    "uneven": {"accelerator_config": {"even_batches": False, "use_seedable_sampler": False}},
}


class Masked(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of which some tokens are padding, others each time."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError(index)  # or iterating over it would not end
        tokens = torch.randint(3, 250, (LENGTH,), generator=torch.Generator().manual_seed(index))
        mask = (torch.arange(LENGTH) < LENGTH - index % 5).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.where(mask.bool(), tokens, -100)}


def run(folder: Path, case: str, plan: Any = None) -> dict[str, list[float]]:
    from transformers import Trainer, TrainingArguments

    from tests.helpers.models import load_dense

    options = dict(CASES[case])
    if plan is not None:
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_optimization": {"stage": 0 if "optim" in options else 1},
        }  # fmt: skip
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=2, max_steps=STEPS, use_cpu=True, seed=3,
        report_to=[], disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", learning_rate=5e-3,
        save_strategy="no", **options,
    )  # fmt: skip
    model: Any = plan.load_model(folder / "checkpoint") if plan else load_dense(folder / "checkpoint")
    trainer = Trainer(model, arguments, train_dataset=Masked())
    if plan is not None:
        plan.adapt_trainer(trainer)
    trainer.train()
    found: dict[str, list[float]] = {}
    last = trainer.state.log_history[-1]
    for entry in trainer.state.log_history:
        for name in NAMES:
            if name in entry and not name.endswith("per_second"):
                found.setdefault(name, []).append(entry[name])
    for name in NAMES:
        if name in last and name.endswith("per_second"):
            found[name] = [last[name] * last["train_runtime"]]
    found["parameters"] = [
        model.num_parameters(only_trainable=trainable, exclude_embeddings=excluded)
        for trainable in (False, True)
        for excluded in (False, True)
    ]
    return found


def dense_run(folder: Path) -> dict[str, Any]:
    return {case: run(folder, case) for case in CASES}


def in_two_ranks(folder: Path) -> dict[str, Any]:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    ours: Any = importlib.import_module("autotp_plan.runtime.integrations.trainer")
    plan = TrainingPlan(compile_plan(folder / "checkpoint", tp_size=2))
    found = {case: run(folder, case, plan) for case in CASES}
    ours.count_tokens_with = lambda trainer, gather: None  # the error that is looked for
    found["planted"] = run(folder, "all", plan)
    return found


def close(found: dict[str, list[float]], wanted: dict[str, list[float]], case: str) -> None:
    assert found.keys() == wanted.keys(), case
    for name, values in wanted.items():
        rounding = 0.02 if name.endswith("per_second") else 2e-5  # Trainer rounds rates and runtime to three places
        assert found[name] == pytest.approx(values, rel=rounding), f"{case}: {name}"


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_what_trainer_logs_is_what_it_logs_for_the_unsharded_model(tmp_path: Path) -> None:
    from tests.helpers.models import save_checkpoint

    save_checkpoint(tmp_path / "checkpoint", "llama")
    wanted = launch(dense_run, 1, tmp_path)[0]
    assert wanted["all"]["num_input_tokens_seen"][-1] == STEPS * 2 * LENGTH
    assert wanted["non_padding"]["num_input_tokens_seen"][-1] < STEPS * 2 * LENGTH
    for found in launch(in_two_ranks, 2, tmp_path):
        planted = found.pop("planted")["num_input_tokens_seen"]
        assert planted[-1] == 2 * wanted["all"]["num_input_tokens_seen"][-1]
        for case, values in found.items():
            close(values, wanted[case], case)
