"""TRL's trainers on a sharded model log what they log on the dense one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


def sft(model: Any, out: Path, deepspeed: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.helpers import trl

    data = Dataset.from_list([{"text": trl.text(seed)} for seed in range(16)])
    config = SFTConfig(str(out), deepspeed=deepspeed, **trl.CONFIG)
    return SFTTrainer(
        model, config, train_dataset=data, eval_dataset=data.select(range(5)), processing_class=trl.tokenizer()
    )


TRAINERS = {"sft": sft}


def run(trainer: Any) -> list[dict[str, float]]:
    from tests.helpers import trl

    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    return trl.history(trainer)


def dense(name: str, folder: Path, out: Path) -> list[dict[str, float]]:
    from tests.helpers.models import load_dense

    warnings.simplefilter("ignore")
    return run(TRAINERS[name](load_dense(folder), out, None))


def sharded(name: str, folder: Path, plan_file: Path, out: Path, stages: list[int]) -> list[Any]:
    from autotp_plan.runtime import load_plan
    from tests.helpers import trl

    warnings.simplefilter("ignore")
    plan = load_plan(plan_file)
    found = []
    for stage in stages:
        trl.forget_accelerator()
        trainer = TRAINERS[name](plan.load_model(folder), out, trl.deepspeed_config(stage))
        plan.adapt_trainer(trainer)
        found.append(run(trainer))
    return found


def assert_equal(found: list[dict[str, float]], expected: list[dict[str, float]], missing: set[str]) -> None:
    assert len(found) == len(expected)
    for step, wanted in zip(found, expected):
        assert step.keys() | missing >= wanted.keys(), (step, wanted)
        for key in step.keys() & wanted.keys():
            assert step[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), (key, step, wanted)


@pytest.mark.parametrize("variant", ["llama", "llama_bias_tied"])
def test_sft(tmp_path: Path, variant: str) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers import trl

    folder = trl.make_checkpoint(tmp_path / "model", variant)
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    (expected,) = launch(dense, 1, "sft", folder, tmp_path / "out")
    assert len({entry["loss"] for entry in expected if "loss" in entry}) == 3 and "eval_loss" in expected[-1]
    stages = [0, 2, 3] if variant == "llama" else [1]
    for ranks in launch(sharded, 2, "sft", folder, tmp_path / "plan.json", tmp_path / "out", stages):
        for stage, found in zip(stages, ranks):  # without ZeRO and with fp32 there is no norm in DeepSpeed
            assert_equal(found, expected, missing=set() if stage else {"grad_norm"})
