"""Training steps without data, by DeepSpeed's own engine: as in a job where there is one to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.schemas.estimate.document import RankEstimate
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.launch import launch


def settings(stage: int, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "dp_size": 2, "zero_stage": stage, "micro_batch_size": 2, "seq_length": 96, "dtype": "bf16", "device": "cpu"
    }  # fmt: skip
    return Settings(**{**given, **more})


def steps_in_a_job(plan_file: Path, checkpoint: Path, given: list[Settings]) -> list[RankEstimate]:
    """What is seen of real steps."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.estimate.engine_step import DTYPES, run_engine
    from autotp_plan.runtime.optimizers import choose

    choose._checks_every_optimizer = True  # so that no optimizer is probed in its first step
    plan, found = load_plan(plan_file), []
    for one in given:
        dtype: torch.dtype = DTYPES[one.dtype]
        model = plan.load_model(checkpoint, dtype=dtype, check_batches_every=None, loss_chunks=one.loss_chunks).train()
        found.append(run_engine(plan.document, model, plan.ranks, None, one, CONFIG))
    return found


def steps_without_data(plan_file: Path, given: Settings, planted: str) -> RankEstimate:
    from autotp_plan.runtime.estimate import engine_step as estimate

    if planted == "masks":
        estimate.with_sequences_unpacked = contextlib.nullcontext  # type: ignore[attr-defined]
    return estimate.engine_step(Plan.read(plan_file), 0, given, CONFIG)


def without_data(plan_file: Path, given: Settings, planted: str = "") -> RankEstimate:
    found: RankEstimate = launch(steps_without_data, 1, plan_file, given, planted)[0]
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.models import save_checkpoint

    folder = tmp_path_factory.mktemp("engine")
    save_checkpoint(folder / "checkpoint", "llama")
    (folder / "plan.json").write_text(compile_plan(folder / "checkpoint", tp_size=2).to_json())
    return folder


CONFIG = {"zero_optimization": {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000}}
CASES = [
    settings(0, dtype="fp32"),
    settings(1, gradient_accumulation_steps=4),
    settings(2, activation_checkpointing=True),
    settings(3, micro_batch_size=4),
    settings(1, selective_checkpointing=True, loss_chunks=4),
]


def as_in_a_job(predicted: int, measured: int, given: Settings) -> bool:
    """To 3 %; and gloo's thread may hold a tensor of the job for a moment after it was summed over the ranks.

    It has two of them: with selective checkpointing the last sum of each layer is held by nobody else.
    """
    summed = (1 + given.selective_checkpointing) * given.micro_batch_size * given.seq_length * 64 * given.element_bytes
    return 0.97 * (measured - summed) <= predicted <= 1.03 * measured


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_steps_without_data_are_those_of_a_job(work: Path) -> None:
    """Every collective with its bytes, and every operation; memory to 3 %."""
    real = launch(steps_in_a_job, 4, work / "plan.json", work / "checkpoint", CASES)[0]
    for given, job in zip(CASES, real, strict=True):
        found = without_data(work / "plan.json", given)
        # in its first steps ZeRO 3 compares a few numbers over all ranks
        assert found.traffic == tuple(one for one in job.traffic if one.operation != "broadcast"), given
        assert found.forward_operations == job.forward_operations
        assert found.backward_operations == job.backward_operations
        assert as_in_a_job(found.peak, job.peak, given)
        for one, other in zip(found.phases, job.phases, strict=True):
            assert one.what == other.what
            assert as_in_a_job(one.bytes, other.bytes, given), (given, one, other)
        if given.activation_checkpointing:
            fused = without_data(work / "plan.json", dataclasses.replace(given, device="cuda"))
            assert fused.traffic == found.traffic and fused.backward_operations == found.backward_operations
            assert as_in_a_job(fused.peak, job.peak, given), "on the CPU this attention is fused, too"
        if given.loss_chunks is not None:
            gathered = [one for one in job.traffic if one.group == "tensor" and one.operation != "all-reduce"]
            assert not gathered, "the engine looks at outputs, and no logits are computed for it"
            more = without_data(work / "plan.json", dataclasses.replace(given, loss_chunks=None).recomputing(None))
            less = without_data(work / "plan.json", given.recomputing("full"))
            assert less.peak < found.peak < 0.95 * more.peak, "what is kept would be found"
        elif given.zero_stage == 1:
            masks = without_data(work / "plan.json", given, planted="masks")
            assert masks.peak > 1.03 * found.peak, "masks that a job does not make would be found"
