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


def step_in_a_job(plan_file: Path, checkpoint: Path, activation_checkpointing: bool) -> Any:
    """What `Watch` sees of a real step, with the loss that a job has."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.estimate.training_step import Batch, run_step

    plan = load_plan(plan_file)
    model = plan.load_model(checkpoint, dtype=torch.float32, check_batches_every=None)
    batch = Batch(sequences=SEQUENCES, length=LENGTH)
    return run_step(model.train(), plan.ranks, contextlib.nullcontext(), batch, activation_checkpointing)


def step_without_data(
    plan_file: Path, rank: int, dp_size: int, batch: tuple[int, int], dtype: str, checkpointing: bool, planted: str
) -> Any:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from autotp_plan.runtime.estimate import training_step as estimate

    if planted == "masks":
        estimate.with_sequences_unpacked = contextlib.nullcontext  # type: ignore[attr-defined]
    if planted == "counts by module":
        estimate.count_operations = lambda: FlopCounterMode(display=False)  # type: ignore[attr-defined]
    return estimate.training_step(
        Plan.read(plan_file), rank, dp_size, estimate.Batch(sequences=batch[0], length=batch[1]),
        getattr(torch, dtype), checkpointing,
    )  # fmt: skip


def without_data(
    plan_file: Path, rank: int, dp_size: int = 1, batch: tuple[int, int] = (SEQUENCES, LENGTH),
    dtype: str = "float32", checkpointing: bool = False, planted: str = "",
) -> Any:  # fmt: skip
    arguments = (plan_file, rank, dp_size, batch, dtype, checkpointing, planted)
    return launch(step_without_data, 1, *arguments)[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.models import save_checkpoint

    folder = tmp_path_factory.mktemp("estimate")
    save_checkpoint(folder / "checkpoint", "llama")
    (folder / "plan.json").write_text(compile_plan(folder / "checkpoint", tp_size=2).to_json())
    return folder


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_data_is_the_step_of_a_job(work: Path, checkpointing: bool) -> None:
    """Every collective and operation; memory to 2 %: a job's first forward makes a few small tensors besides."""
    for rank, real in enumerate(launch(step_in_a_job, 2, work / "plan.json", work / "checkpoint", checkpointing)):
        found = without_data(work / "plan.json", rank, checkpointing=checkpointing)
        for field in ("parameters", "buffers", "forward_operations", "backward_operations", "collectives"):
            assert getattr(found, field) == getattr(real, field), field
        for field in ("kept", "forward_peak", "backward_peak"):
            assert getattr(found, field) == pytest.approx(getattr(real, field), rel=0.02), field
        assert [size for size, _ in found.backward] == [size for size, _ in real.backward]
        if rank == 0 and not checkpointing:
            masks = without_data(work / "plan.json", rank, planted="masks")
            assert masks.kept > 1.02 * real.kept, "masks that a job does not make would be found"


def test_what_is_computed_again_is_freed_layer_by_layer(tmp_path: Path) -> None:
    """The backward ends with less than it began with; hooks on modules would keep layers of experts."""
    from tests.helpers.models import make_config

    make_config("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path)
    (tmp_path / "plan.json").write_text(compile_plan(tmp_path, tp_size=2).to_json())
    found, planted = (
        without_data(tmp_path / "plan.json", 0, dtype="bfloat16", checkpointing=True, planted=planted)
        for planted in ("", "counts by module")
    )
    assert found.backward[-1][1] < found.backward[0][1] < planted.backward[-1][1]
