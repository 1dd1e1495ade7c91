"""`runtime.train` on a job that was begun with another --num-steps."""

from __future__ import annotations

import importlib
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch

LENGTH = 16


def train(folder: Path, job: str, num_steps: int, **changes: Any) -> list[float]:
    """The losses of a run of the training program."""
    from autotp_plan.runtime.train import _train

    metrics = folder / f"{uuid.uuid4()}.jsonl"  # rank 0 writes it
    options = {
        "dp_size": None, "zero_stage": 1, "batch_size": 1, "seq_length": LENGTH, "learning_rate": 1e-2,
        "precision": "auto", "data": None, "ds_config": None, "seed": 0, "save_every": None, "save_shards": None,
    }  # fmt: skip
    _train(
        plan_file=folder / "plan.json", shards=str(folder / "checkpoint"), checkpoints=folder / job, metrics=metrics,
        num_steps=num_steps, **{**options, **changes},
    )  # fmt: skip
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["loss"] for line in lines]


def in_two_ranks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["first"] = train(folder, "job", 2)
    found["second"] = train(folder, "job", 5)
    found["the same once more"] = train(folder, "job", 5)
    found["fewer"] = train(folder, "job", 3)
    found["more"] = train(folder, "job", 6)
    with pytest.raises(MismatchError, match="the data is not that of the saved job") as caught:
        train(folder, "job", 8, seq_length=LENGTH // 2)
    found["other length"] = str(caught.value)

    setup: Any = importlib.import_module("autotp_plan.runtime.train_setup")
    dataset = setup.dataset
    setup.dataset = lambda data, shards, model, length, needed, seed: dataset(
        data, shards, model, length, 2 * LENGTH, seed
    )
    found["undisturbed"] = train(folder, "undisturbed", 6)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_job_goes_on_for_more_steps_on_the_data_it_was_begun_with(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "checkpoint", "llama")
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    found = launch(in_two_ranks, 2, tmp_path)[0]
    assert [len(found[name]) for name in ("first", "second", "the same once more", "fewer", "more")] == [2, 3, 0, 0, 1]
    steps = found["first"] + found["second"] + found["more"]
    assert steps == pytest.approx(found["undisturbed"], rel=1e-6)
    assert f"2 sequences of {LENGTH // 2} tokens" in found["other length"]
    assert f"2 sequences of {LENGTH} tokens" in found["other length"]
