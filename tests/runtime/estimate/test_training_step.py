"""Steps on tensors without data: as in a job where there is one to compare with, and of jobs too large to run here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.plan_table import summary
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.launch import launch
from tests.helpers.paths import PLANS

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

    from autotp_plan.runtime.estimate import training_step as estimate

    if planted == "masks":
        estimate.with_sequences_unpacked = contextlib.nullcontext  # type: ignore[attr-defined]
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


def held_by(plan: Plan, rank: int) -> int:
    return summary(plan).per_rank[rank % plan.tp_size]


LLAMA, DEEPSEEK = PLANS / "llama_3_1_405b" / "tp8.json", PLANS / "deepseek_v3" / "tp8.json"


@pytest.mark.parametrize(
    "rank", [pytest.param(0, marks=pytest.mark.slow), 515, pytest.param(1023, marks=pytest.mark.slow)]
)
def test_llama_405b_on_1024_ranks(rank: int) -> None:
    plan, length, dp_size = Plan.read(LLAMA), 4096, 128
    found = without_data(LLAMA, rank, dp_size, (1, length), "bfloat16")
    layers, hidden, intermediate, vocab, kv = 126, 16384, 53248, 128256, 1024
    assert found.parameters == held_by(plan, rank)
    assert found.backward[-1][0] == found.parameters, "a gradient for every weight"
    sums = {one.tensor_bytes: one.count for one in found.collectives}
    # two sums forward and two backward in each layer, the embedding's, and the head's; then two of a number per token
    assert sums == {length * hidden * 2: 4 * layers + 2, length * 4: 1, 2 * length * 4: 1}
    assert {(one.operation, one.group) for one in found.collectives} == {("allreduce_", "tensor")}
    products = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate) + hidden * vocab
    attention = layers * 2 * 2 * length * length * hidden
    assert found.forward_operations == (2 * length * products + attention) // plan.tp_size
    assert found.backward_operations >= 2 * found.forward_operations


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 515, 1023])
def test_deepseek_v3_on_1024_ranks(rank: int) -> None:
    plan, length = Plan.read(DEEPSEEK), 2048
    found = without_data(DEEPSEEK, rank, 128, (1, length), "bfloat16")
    assert found.parameters == pytest.approx(held_by(plan, rank), rel=1e-3), "some of its weights stay in float32"
    layers, dense, hidden, sharded = 61, 3, 7168, length * 2
    moe = layers - dense  # a sum forward of the experts and of the shared one, and backward
    sums = {one.tensor_bytes: one.count for one in found.collectives}
    assert sums == {
        sharded * hidden: layers + 2 * (dense + 2 * moe) + 2,
        sharded * 1536: layers, sharded * 512: layers, sharded * 64: layers,  # gradients of latents and of rotary keys
        length * 8 * 4: moe,  # of the weights of the chosen experts
        length * 4: 1, 2 * length * 4: 1,
    }  # fmt: skip
    routed = 3 * hidden * 2048 * 8 * moe
    others = 3 * hidden * (2048 * moe + 18432 * dense) + hidden * 129280
    attention = layers * (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * hidden + length * 128 * (192 + 128))
    whole = layers * hidden * (1536 + 576) + moe * hidden * 256  # latents and routers, on every rank
    assert found.forward_operations == 2 * length * ((routed + others + attention) // plan.tp_size + whole)
