"""A step of all layers from steps of a few: equal to the step, and near what DeepSpeed's engine holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.estimate.extrapolate import small_cases, whole_step, whole_traffic
from autotp_plan.planner.estimate.fewer_layers import Repeating, repeating
from autotp_plan.planner.estimate.from_plan import elements_of_rank
from autotp_plan.planner.estimate.memory import held
from autotp_plan.runtime.estimate.run import estimate_by_running
from autotp_plan.runtime.estimate.small_steps import run_small_steps
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.estimate.step import StepCase
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import write_llama

LENGTH, BUCKET = 256, 20_000
CONFIG = {
    "zero_optimization": {
        "reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET,
        "stage3_max_reuse_distance": BUCKET, "stage3_param_persistence_threshold": 0,
    }
}  # fmt: skip
RUNS = [
    Settings(dp_size=4, zero_stage=1, micro_batch_size=3, activation_checkpointing=True),
    Settings(dp_size=4, zero_stage=2, gradient_accumulation_steps=2),
    Settings(dp_size=4, zero_stage=3, micro_batch_size=3),
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("small") / "llama"
    return compile_plan(write_llama(folder, num_hidden_layers=12), tp_size=2)


def full_case(plan: Plan, sequences: int, again: str | None) -> StepCase:
    return StepCase(plan=plan, tp_rank=0, sequences=sequences, length=LENGTH, activation_checkpointing=again)


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_step_from_small_ones(plan: Plan) -> None:
    assert repeating(plan) == Repeating(fewer=1, period=1, times=11)
    small = [small_cases(plan, 0, LENGTH, again) for again in (None, "full")]
    full = [full_case(plan, 3, again) for again in (None, "full")]
    ran = run_small_steps([*(case for one in small for case in one.cases), *full])
    found = [small[0].of(ran[:3]), small[1].of(ran[3:6])]
    for one, whole in zip(found, ran[6:], strict=True):
        got = whole_step(one, 3)
        for name in ("parameters", "buffers", "forward_operations", "backward_operations"):
            assert getattr(got, name) == getattr(whole, name), name
        (sent,) = whole_traffic(one, 3)
        assert (sent.operation, sent.group) == ("all-reduce", "tensor")
        assert sent.count == sum(each.count for each in whole.collectives)
        assert sent.bytes == sum(each.count * each.tensor_bytes for each in whole.collectives)
        assert got.kept == pytest.approx(whole.kept, rel=1e-4)  # numbers of 4 bytes do not grow with the batch
        assert got.forward_peak == pytest.approx(whole.forward_peak, rel=5e-3)
        assert [size for size, _ in got.backward] == [size for size, _ in whole.backward]
        for (_, alive), (_, expected) in zip(got.backward, whole.backward, strict=True):
            assert alive == pytest.approx(expected, rel=1e-3)
    wrong = dataclasses.replace(found[0], times=found[0].times - 1)
    assert whole_step(wrong, 3).kept < 0.95 * ran[6].kept, "a layer that is forgotten is found"


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.parametrize("settings", RUNS, ids=lambda one: f"stage {one.zero_stage}")
def test_what_the_engine_holds(plan: Plan, settings: Settings) -> None:
    settings = dataclasses.replace(settings, seq_length=LENGTH)
    elements = elements_of_rank(plan, 0)
    (step,) = run_small_steps([full_case(plan, settings.micro_batch_size, settings.recomputed)])
    found = held(step, elements, settings, bucket_elements=BUCKET, most_live=BUCKET)
    full = estimate_by_running(plan, settings, CONFIG).fullest
    phases: dict[str, Any] = {part.what: part.bytes for part in full.phases}
    assert found.forward == pytest.approx(phases["forward"], rel=0.05)
    assert found.backward == pytest.approx(phases["backward"], rel=0.05)
    assert found.peak == pytest.approx(full.peak, rel=0.05)
