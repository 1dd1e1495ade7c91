"""A rank that stops does not keep the others: they end in time, and say what they waited for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import FailedRankError, OptionError
from tests.helpers.launch import launch

SECONDS = 4


def one_stops(work: Path) -> None:
    """Inside a rank: train; after its second step the last rank is stopped, as by SIGSTOP from outside."""
    import torch.distributed as dist

    from autotp_plan.runtime.train import _train
    from autotp_plan.runtime.train_report import Report

    last = dist.get_rank() == 1

    def step(self: Any, number: int, *_: Any) -> None:
        if number == 2:
            if last:
                os.kill(os.getpid(), signal.SIGSTOP)
            (work / "began").write_text(str(time.time()))

    Report.step = step  # type: ignore[method-assign, assignment]
    _train(
        work / "plan.json", str(work / "checkpoint"), dp_size=None, zero_stage=1, batch_size=1, seq_length=8,
        learning_rate=1e-2, precision="auto", data=None, ds_config=None, seed=0, save_every=None, num_steps=9,
        save_shards=None, checkpoints=None, metrics=None, timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_stopped_rank_ends_the_others_with_what_they_waited_for(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "checkpoint", "llama")
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    with pytest.raises(FailedRankError) as caught:
        launch(one_stops, 2, tmp_path, timeout=90)
    fault = caught.value.faults[0]
    assert fault.code == "rank-did-not-come"
    assert fault.where == "the forward of step 3" and f"within {SECONDS} seconds" in str(fault.expected)
    assert time.time() - float((tmp_path / "began").read_text()) < SECONDS + 20


def test_seconds_that_nobody_can_wait_are_refused(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import load_plan
    from tests.helpers.checkpoints import write_llama

    (tmp_path / "plan.json").write_text(compile_plan(write_llama(tmp_path / "llama"), tp_size=1).to_json())
    for seconds in (0, -1, float("nan"), 1e10):
        with pytest.raises(OptionError):
            load_plan(tmp_path / "plan.json").init_mesh(timeout=seconds)
