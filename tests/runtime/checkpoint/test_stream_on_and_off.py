"""Sequence parallelism turned on and off where weights and jobs are already there: shards load, jobs continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan, presplit
from tests.helpers.launch import launch
from tests.helpers.models import save_checkpoint

SAVED_AT, NUM_STEPS = 2, 4
STAGES = (0, 3)


def start(work: Path, on: bool, stage: int) -> tuple[Any, Any]:
    """A job by the plan with sequence parallelism or without it, from the shards of the other."""
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    plan = load_plan(work / f"{on}.json")
    torch.manual_seed(5)
    model = plan.load_model(work / f"shards-{not on}").train()
    settings = parity.engine_settings(stage)
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 2e-3}}
    return plan, plan.initialize(model, config=settings)[0]


def steps(engine: Any, first: int, last: int) -> list[float]:
    from tests.helpers.models import batch

    losses = []
    for step in range(first, last):
        tokens = batch(step)
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def jobs(work: Path) -> list[tuple[str, list[float], list[float]]]:
    """The losses of jobs that are not disturbed, and of those that another plan continues."""
    found = []
    for stage in STAGES:
        for on in (False, True):
            plan, engine = start(work, on, stage)
            folder = work / f"{on}-{stage}"
            whole = steps(engine, 0, SAVED_AT)
            plan.save_checkpoint(engine, folder)
            whole += steps(engine, SAVED_AT, NUM_STEPS)
            engine.destroy()
            plan, engine = start(work, not on, stage)
            plan.load_checkpoint(engine, folder)
            resumed = steps(engine, SAVED_AT, NUM_STEPS)
            engine.destroy()
            found.append((folder.name, whole, resumed))
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_job_continues_by_the_other_plan(tmp_path: Path) -> None:
    """Under ZeRO 0 too, where a job of any other plan cannot be resumed."""
    folder = save_checkpoint(tmp_path / "model", "llama")
    for on in (False, True):
        plan = compile_plan(folder, tp_size=2, sequence_parallel=on)
        (tmp_path / f"{on}.json").write_text(plan.to_json())
        presplit(plan, folder, tmp_path / f"shards-{on}")
    (first, other) = launch(jobs, 2, tmp_path)
    assert first == other
    undisturbed = first[0][1]
    for name, whole, resumed in first:
        assert whole == pytest.approx(undisturbed, rel=1e-6), name
        assert resumed == pytest.approx(undisturbed[SAVED_AT:], rel=1e-6), name
    assert abs(undisturbed[-1] - undisturbed[0]) > 1e-3
