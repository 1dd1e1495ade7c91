"""What is checked on a GPU by starting the training program as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 1e-5
STEPS = 5


def checks(work: Path, only: list[str]) -> list[dict[str, Any]]:
    """The checks, run. Only for a machine with a card."""
    found = []
    functions: dict[str, Callable[[Path], tuple[float | None, dict[str, Any]]]] = {
        "program on one card, NCCL": one_card,
        "program with too few cards": too_few_cards,
    }
    for name, function in functions.items():
        if only and not any(name.startswith(beginning) for beginning in only):
            continue
        began = time.monotonic()
        worst: float | None = None
        figures: dict[str, Any] = {}
        error = ""
        try:
            worst, figures = function(work)
        except (AssertionError, subprocess.SubprocessError) as caught:
            error = str(caught)
        ok = not error and (worst is None or worst <= LIMIT)
        limit = None if worst is None else LIMIT
        found.append({"name": name, "limit": limit, "ok": ok, "worst": worst, "figures": figures, "error": error,
                      "seconds": time.monotonic() - began})  # fmt: skip
    return found


def one_card(work: Path) -> tuple[float | None, dict[str, Any]]:
    """Losses of a plan for one rank on a card, whose process group is NCCL's, against those on the CPU."""
    losses = {device: _train(work, device, 1, [sys.executable]) for device in ("cuda", "cpu")}
    pairs = zip(losses["cuda"], losses["cpu"], strict=True)
    return max(abs(one - other) / other for one, other in pairs), {"last loss": losses["cuda"][-1]}


def too_few_cards(work: Path) -> tuple[float | None, dict[str, Any]]:
    """torchrun with one rank more than there are cards."""
    import torch

    ranks = torch.cuda.device_count() + 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    try:
        _train(work, "cuda", ranks, launcher)
    except AssertionError as error:
        said = [line for line in str(error).splitlines() if line.startswith("error:")]
        assert said and "fewer devices than ranks" in said[0], error
        return None, {"says": said[0]}
    raise AssertionError("it trained")


def _train(work: Path, device: str, tp_size: int, launcher: list[str]) -> list[float]:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    checkpoint = work / "trained by a program"
    if not checkpoint.exists():
        save_checkpoint(checkpoint, "llama")
    plan, metrics = work / f"plan-{tp_size}.json", work / f"metrics-{device}.jsonl"
    plan.write_text(compile_plan(checkpoint, tp_size=tp_size).to_json())
    options = ["--plan", str(plan), "--shards", str(checkpoint), "--num-steps", str(STEPS), "--seq-length", "32",
               "--precision", "fp32", "--metrics", str(metrics)]  # fmt: skip
    done = subprocess.run(
        [*launcher, "-m", "autotp_plan.runtime.train", *options],
        env={**os.environ, "DS_ACCELERATOR": device}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
