"""A job that is killed and resumed has the losses of the undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.runtime.verify.workers import RankError
from autotp_plan.schemas.jobs.job_folder import newest_sound
from tests.helpers.launch import launch
from tests.helpers.programs import started

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "fused and grouped": ("phi3", {"attention_dropout": 0.1}, False),
    "experts": ("mixtral", {}, False),
    "uneven": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "vocab_size": 257},
        True,
    ),
    "shared rows": ("falcon_multi_query", {}, False),
}
RUNS = [(name, stage) for name in ("fused and grouped", "experts", "uneven") for stage in (1, 2, 3)]
RUNS += [("uneven", 0), ("shared rows", 1)]
NUM_STEPS, SAVED_AT, KILLED_AT = 6, 3, 5


def dataset() -> Any:
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens

    return TokenDataset(synthetic_tokens(250, 16 * 12 + 12), 12)  # 17 windows: epochs end inside the run


def start(work: Path, name: str, stage: int) -> tuple[Any, Any, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    plan = load_plan(work / f"{name}.json")
    torch.manual_seed(11)
    settings = parity.engine_settings(stage, accumulation=2)
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 2e-3}}
    model = plan.load_model(work / name).train()
    engine, _, loader, _ = plan.initialize(model, config=settings, training_data=dataset())
    return plan, engine, loader


def steps(plan: Any, engine: Any, loader: Any, first: int, last: int, save: Any = None) -> list[float]:
    from autotp_plan.runtime.data.sampler import endless

    losses = []
    source = endless(loader)
    for step in range(first, last):
        for _ in range(2):
            loss = engine(**next(source), use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if save is not None and step + 1 == SAVED_AT:
            plan.save_checkpoint(engine, save, client_state={"mine": step})
    return losses


def undisturbed(work: Path) -> dict[str, Any]:
    found = {}
    for name, stage in RUNS:
        plan, engine, loader = start(work, name, stage)
        found[f"{name} zero{stage}"] = steps(plan, engine, loader, 0, NUM_STEPS)
        engine.destroy()
    return found


def killed(work: Path) -> None:
    """Saves, goes on, and dies without a word."""

    from autotp_plan.runtime.checkpoint import job

    for name, stage in RUNS:
        plan, engine, loader = start(work, name, stage)
        folder = work / f"{name} zero{stage}"
        steps(plan, engine, loader, 0, KILLED_AT, folder)
        save, job.save_rng_state = job.save_rng_state, died  # type: ignore[attr-defined, assignment]
        with contextlib.suppress(Killed):
            plan.save_checkpoint(engine, folder)
        job.save_rng_state = save  # type: ignore[attr-defined]
        engine.destroy()
    os._exit(0)


class Killed(BaseException):
    """What no code of ours catches, as it would not run any more."""


def died(*_: Any) -> None:
    raise Killed("half-way through a save")


def resumed(work: Path) -> dict[str, Any]:
    from autotp_plan.schemas.errors import MismatchError

    found: dict[str, Any] = {}
    for name, stage in RUNS:
        plan, engine, loader = start(work, name, stage)
        folder = work / f"{name} zero{stage}"
        assert plan.load_checkpoint(engine, folder) == {"mine": SAVED_AT - 1}
        found[folder.name] = steps(plan, engine, loader, SAVED_AT, NUM_STEPS)
        other = next(run for run in RUNS if run[0] != name)
        with pytest.raises(MismatchError, match="the saved job is of another model"):
            plan.load_checkpoint(engine, work / f"{other[0]} zero{other[1]}")
        engine.destroy()
    return found


def test_a_killed_job_resumes_with_the_losses_of_an_undisturbed_one(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    for name, (variant, changes, uneven) in VARIANTS.items():
        folder = save_checkpoint(tmp_path / name, variant, **changes)
        (tmp_path / f"{name}.json").write_text(compile_plan(folder, tp_size=2, uneven=uneven).to_json())
    whole = launch(undisturbed, 4, tmp_path, timeout=280)
    with pytest.raises(RankError, match="rank 0 ended without a result"):
        launch(killed, 4, tmp_path, timeout=280)
    for rank, found in enumerate(launch(resumed, 4, tmp_path, timeout=280)):
        for run, losses in found.items():
            assert losses == pytest.approx(whole[rank][run][2 * SAVED_AT :], rel=1e-6), run


TRAINED = {"fused and grouped": 1, "experts": 2, "uneven": 3}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("experts", "uneven")]
"""Their jobs are resumed by `test_a_killed_job_resumes_with_the_losses_of_an_undisturbed_one` too."""


@pytest.mark.parametrize("name", ["fused and grouped", *SLOW])
def test_a_training_program_killed_at_a_random_step_resumes(name: str, tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan, merge
    from tests.helpers.models import save_checkpoint

    variant, changes, uneven = VARIANTS[name]
    folder = save_checkpoint(tmp_path / "model", variant, **{**changes, "attention_dropout": 0.1})
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=2, uneven=uneven).to_json())
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    with training(tmp_path, TRAINED[name], whole) as job:
        assert job.wait(240) == 0
    saves = ["--checkpoints", tmp_path / "saved"]
    kill = random.Random(name)
    with training(tmp_path, TRAINED[name], resumed, *saves, "--save-every", "1") as job:
        last = kill.randint(2, 5)
        while len(losses(resumed)) < last:
            assert job.poll() is None, f"it ended before it was killed after {last} steps"
            time.sleep(0.02)
        time.sleep(kill.random() / 20)
    saved = int((newest_sound(tmp_path / "saved") or "step0").removeprefix("step"))
    with training(tmp_path, TRAINED[name], resumed, *saves) as job:  # what no `--save-every` saves, a signal does
        while len(losses(resumed)) <= saved + 1:  # the killed one may have written of one step more than it saved
            assert job.poll() is None, "it ended before it was asked to stop"
            time.sleep(0.02)
        job.terminate()  # torchrun passes it on
        assert job.wait(120) != 0
    done = len(losses(resumed))
    assert newest_sound(tmp_path / "saved") == f"step{done}" and done < 12
    with training(tmp_path, TRAINED[name], resumed, *saves, "--save-shards", tmp_path / "trained") as job:
        assert job.wait(240) == 0
    assert len(losses(whole)) == 12
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    merge(tmp_path / "trained", tmp_path / "merged")


def losses(metrics: Path) -> list[float]:
    lines = metrics.read_text().splitlines(True) if metrics.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def training(work: Path, stage: int, metrics: Path, *more: object) -> AbstractContextManager[subprocess.Popen[str]]:
    """A training job of two ranks, which the end of the block kills."""
    command = ["torchrun", "--standalone", "--nproc-per-node", "2",
               "-m", "autotp_plan.runtime.train", "--plan", work / "plan.json", "--shards", work / "model",
               "--seq-length", "12", "--num-steps", "12", "--learning-rate", "1e-3", "--zero-stage", stage,
               "--metrics", metrics, *more]  # fmt: skip
    return started(command, output=subprocess.DEVNULL)


@pytest.mark.parametrize("tag", ["..", ".", "", "a/b", "/abs", "a\\b", "latest"])
def test_a_tag_is_a_plain_name(tmp_path: Path, tag: str) -> None:
    from autotp_plan.runtime.checkpoint.job_state import check_tag
    from autotp_plan.schemas.errors import CheckpointError

    with pytest.raises(CheckpointError, match="not the name of a folder"):
        check_tag(tag, tmp_path)


def saves_over(work: Path) -> list[str]:
    """Inside a rank: what saving over things that are not an unfinished save says, and that they are still there."""
    from autotp_plan.schemas.errors import CheckpointError

    plan, engine, _ = start(work, "fused and grouped", 1)
    folder, said = work / "saves", []
    plan.save_checkpoint(engine, folder, "first")
    plan.save_checkpoint(engine, folder, "second")
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "thesis.txt").write_text("years of work")
    for tag in ("first", "second", "mine", ".."):
        try:
            plan.save_checkpoint(engine, folder, tag)
        except CheckpointError as error:
            said.append(error.faults[0].what)
    assert (folder / "mine" / "thesis.txt").exists() and (work / "fused and grouped" / "config.json").exists()
    assert plan.load_checkpoint(engine, folder, "first") == {}
    (folder / "died").mkdir(exist_ok=True)
    (folder / "died" / "autotp_unfinished").touch()
    plan.save_checkpoint(engine, folder, "died")
    return said


def test_saving_overwrites_only_an_unfinished_save(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "fused and grouped", "phi3")
    (tmp_path / "fused and grouped.json").write_text(compile_plan(folder, tp_size=2).to_json())
    overwritten = "something would be overwritten"
    for said in launch(saves_over, 2, tmp_path, timeout=100):
        assert said == [overwritten, overwritten, overwritten, "a tag is not the name of a folder"]
