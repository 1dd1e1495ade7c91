"""Trainer, TRL and torch.compile on a model whose stream is sharded along the sequence: as where it is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


def prepare(work: Path, *variants: str) -> None:
    """`variant/`, `variant.json` with its stream sharded, and `variant.plain.json` without."""
    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.sequence_parallel import with_sequence_parallel
    from tests.helpers import trl

    for variant in variants:
        plan = compile_plan(trl.make_checkpoint(work / variant, variant), tp_size=2)
        (work / f"{variant}.plain.json").write_text(plan.to_json())
        (work / f"{variant}.json").write_text(with_sequence_parallel(plan).to_json())


def logged(work: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Inside a rank: what trainers log, by their name, with the stream sharded and without."""
    from functools import partial

    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import trl
    from tests.runtime.integrations import test_trainer_numbers, test_trl

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for kind in ("llama", "llama.plain"):
        plan = load_plan(work / f"{kind}.json")
        trl.forget_accelerator()
        found[f"Trainer, {kind}"] = [test_trainer_numbers.run(work, "accumulated", plan)]
        for name in names:
            trl.forget_accelerator()
            torch.manual_seed(0)
            load = partial(plan.load_model, work / "llama")
            trainer = test_trl.TRAINERS[name](load(), load, work / "out", trl.deepspeed_config(1))
            plan.adapt_trainer(trainer)
            trainer.train()
            found[f"{name}, {kind}"] = trl.history(trainer)
    return found


@pytest.mark.parametrize("names", [("sft",), pytest.param(("dpo", "grpo"), marks=pytest.mark.slow)])
def test_trainers_log_the_same(tmp_path: Path, names: tuple[str, ...]) -> None:
    prepare(tmp_path, "llama")
    (tmp_path / "checkpoint").symlink_to(tmp_path / "llama")
    for found in launch(logged, 2, tmp_path, names):
        for name in ("Trainer", *names):
            sharded, plain = found[f"{name}, llama"], found[f"{name}, llama.plain"]
            assert len(sharded) == len(plain) > 0
            for one, other in zip(sharded, plain, strict=True):
                assert one.keys() == other.keys()
                for key, value in other.items():
                    if key.endswith("per_second"):
                        continue
                    assert one[key] == pytest.approx(value, rel=2e-5, abs=2e-5), (name, key)


@pytest.mark.slow
def test_compiled_models_compute_what_they_do_without(tmp_path: Path) -> None:
    from tests.runtime.calls import test_torch_compile

    prepare(tmp_path, *test_torch_compile.VARIANTS)
    for found in launch(test_torch_compile.compiled, 2, tmp_path):
        assert max(found.values()) < 5e-6, found
