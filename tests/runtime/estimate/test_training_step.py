"""Steps on tensors without data are as in a job."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.launch import launch

SEQUENCES, LENGTH = 2, 96
SUMMED = SEQUENCES * LENGTH * 64 * 4
"""Bytes of a tensor that a layer of these models sums over the ranks."""


def step_in_a_job(plan_file: Path, checkpoint: Path, activation_checkpointing: str | None) -> Any:
    """What `Watch` sees of a real step, with the loss that a job has."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.estimate.training_step import Batch, run_step

    plan = load_plan(plan_file)
    model = plan.load_model(checkpoint, dtype=torch.float32, check_batches_every=None)
    batch = Batch(sequences=SEQUENCES, length=LENGTH)
    return run_step(model.train(), plan.ranks, contextlib.nullcontext(), batch, activation_checkpointing)


def step_without_data(plan_file: Path, rank: int, dtype: str, checkpointing: str | None, planted: str) -> Any:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from autotp_plan.runtime.estimate import training_step as estimate

    if planted == "masks":
        estimate.with_sequences_unpacked = contextlib.nullcontext  # type: ignore[attr-defined]
    if planted == "counts by module":
        estimate.count_operations = lambda: FlopCounterMode(display=False)  # type: ignore[attr-defined]
    batch = estimate.Batch(sequences=SEQUENCES, length=LENGTH)
    return estimate.training_step(Plan.read(plan_file), rank, 1, batch, getattr(torch, dtype), checkpointing)


def without_data(
    plan_file: Path, rank: int, dtype: str = "float32", checkpointing: str | None = None, planted: str = ""
) -> Any:
    return launch(step_without_data, 1, plan_file, rank, dtype, checkpointing, planted)[0]


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.parametrize(
    ("variant", "checkpointing"),
    [
        ("llama", None), ("llama", "full"), ("llama", "selective"), ("qwen3_moe", None),
        pytest.param("qwen3_moe", "full", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "selective", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_step_without_data_is_the_step_of_a_job(tmp_path: Path, variant: str, checkpointing: str | None) -> None:
    """Every collective and operation; memory to 2 %: a job's first forward makes a few small tensors besides.

    And gloo's thread may hold a tensor of a job for a moment after it was summed.
    """
    from tests.helpers.models import save_checkpoint

    checkpoint, plan_file = tmp_path / "checkpoint", tmp_path / "plan.json"
    save_checkpoint(checkpoint, variant)
    plan_file.write_text(compile_plan(checkpoint, tp_size=2).to_json())
    for rank, real in enumerate(launch(step_in_a_job, 2, plan_file, checkpoint, checkpointing)):
        found = without_data(plan_file, rank, checkpointing=checkpointing)
        for field in ("parameters", "buffers", "forward_operations", "backward_operations", "collectives"):
            assert getattr(found, field) == getattr(real, field), field
        for field in ("kept", "forward_peak", "backward_peak"):
            held, most = getattr(found, field), getattr(real, field)
            assert 0.98 * (most - SUMMED) <= held <= 1.02 * most, field
        assert [size for size, _ in found.backward] == [size for size, _ in real.backward]
        if rank == 0 and variant == "llama" and not checkpointing:
            masks = without_data(plan_file, rank, planted="masks")
            assert masks.kept > 1.02 * found.kept, "masks that a job does not make would be found"


def test_what_is_computed_again_is_freed_layer_by_layer(tmp_path: Path) -> None:
    """The backward ends with less than it began with; hooks on modules would keep layers of experts."""
    from tests.helpers.models import make_config

    make_config("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path)
    (tmp_path / "plan.json").write_text(compile_plan(tmp_path, tp_size=2).to_json())
    found, planted = (
        without_data(tmp_path / "plan.json", 0, dtype="bfloat16", checkpointing="full", planted=planted)
        for planted in ("", "counts by module")
    )
    assert found.backward[-1][1] < found.backward[0][1] < planted.backward[-1][1]
