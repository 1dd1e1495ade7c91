"""An all-gather and a reduce-scatter move together what the all-reduce in their place did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from autotp_plan.planner import compile_plan
from autotp_plan.runtime import TrainingPlan
from autotp_plan.runtime.estimate.fake_internals import Watch
from tests.helpers.launch import launch
from tests.helpers.models import save_checkpoint

TOKENS, WIDTH = 64, 64
ONE = TOKENS * WIDTH * 4
"""Bytes of the residual stream of one sequence in float32."""
NORMS = 5


def bytes_of(folder: Path, sequence_parallel: bool) -> Counter[str]:
    """Bytes of the largest tensor of every collective of a step, by its kind."""
    plan = TrainingPlan(compile_plan(folder, tp_size=2, sequence_parallel=sequence_parallel))
    model = plan.load_model(folder, dtype=torch.float32, check_batches_every=None).train()
    tokens = torch.arange(TOKENS).view(1, TOKENS)
    found: Counter[str] = Counter()
    with Watch(lambda name, _, size: found.update({name: size})):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return found


def step(folder: Path) -> tuple[Counter[str], Counter[str]]:
    return bytes_of(folder, False), bytes_of(folder, True)


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_step_communicates_the_bytes_that_it_did(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    whole, sharded = launch(step, 2, tmp_path)[0]
    sums = 2 * 2 * 2 + 2  # attention and MLP of two layers, in forward and backward; embedding; input of the head
    of_the_loss = whole["allreduce_"] - sums * ONE
    assert 0 < of_the_loss < ONE
    assert sharded["_allgather_base_"] == sums * ONE
    assert sharded["alltoall_base_"] == sums * ONE  # gloo's reduce-scatter
    assert sharded["allreduce_"] == of_the_loss + NORMS * WIDTH * 4  # and the gradients of the norms
