"""What is checked on a GPU by starting the training program as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.gpu.work import Found, Work, relative

STEPS = 5


def one_card(work: Work) -> Found:
    """Losses of a plan for one rank on a card, whose process group is NCCL's, against those on the CPU."""
    losses = {device: _train(work, device, 1, [sys.executable]) for device in (work.device, "cpu")}
    return relative(losses[work.device], losses["cpu"]).found(**{"last loss": losses[work.device][-1]})


def too_few_cards(work: Work) -> Found:
    """torchrun with one rank more than there are cards."""
    import torch

    ranks = torch.cuda.device_count() + 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    try:
        _train(work, "cuda", ranks, launcher)
    except AssertionError as error:
        said = [line for line in str(error).splitlines() if line.startswith("error:")]
        assert said and "fewer devices than ranks" in said[0], error
        return Found(figures={"says": said[0]})
    raise AssertionError("it trained")


def _train(work: Work, device: str, tp_size: int, launcher: list[str]) -> list[float]:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    checkpoint = work.once("trained by a program", lambda path: save_checkpoint(path, "llama"))
    plan, metrics = work.folder / f"plan-{tp_size}.json", work.folder / f"metrics-{device}-{tp_size}.jsonl"
    metrics.unlink(missing_ok=True)
    plan.write_text(compile_plan(checkpoint, tp_size=tp_size).to_json())
    options = ["--plan", str(plan), "--shards", str(checkpoint), "--num-steps", str(STEPS), "--seq-length", "32",
               "--precision", "fp32", "--metrics", str(metrics)]  # fmt: skip
    done = subprocess.run(
        [*launcher, "-m", "autotp_plan.runtime.train", *options],
        env={**os.environ, "DS_ACCELERATOR": device}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
