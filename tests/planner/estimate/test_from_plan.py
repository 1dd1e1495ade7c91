"""What the plan alone says of a training step."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.estimate.from_plan import elements_of_rank, estimate_from_plan
from autotp_plan.planner.plan_table import human_bytes
from autotp_plan.schemas.estimate.document import kinds_of_ranks
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.checkpoints import write_llama
from tests.helpers.paths import PLANS

LLAMA = Plan.read(PLANS / "llama_3_1_8b" / "tp4.json")
NUMBER = 4096 * (128256 * 2 // 4 + 1 + 32 * (2 + (2 * 4096 + 2 * 1024 + 3 * 14336) // 4))
"""Elements of a rank of Llama-3.1-8B at TP=4: its norms are held by every rank."""


def test_elements() -> None:
    assert elements_of_rank(LLAMA, 3) == NUMBER
    assert kinds_of_ranks(LLAMA) == [(0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
)
def test_what_each_stage_divides(stage: int, weights: int, gradients: int, states: int) -> None:
    found = estimate_from_plan(LLAMA, Settings(dp_size=8, zero_stage=stage)).fullest
    sizes = {part.what: part.bytes for part in found.at_peak}
    assert sizes == {
        "weights": 2 * NUMBER // weights,
        "gradients": 2 * NUMBER // gradients,
        "master weights": 4 * NUMBER // states,
        "optimizer states": 8 * NUMBER // states,
    }
    assert found.peak == sum(sizes.values())


def test_what_is_held_without_master_weights_and_on_the_host() -> None:
    plain = estimate_from_plan(LLAMA, Settings(dtype="fp32")).fullest
    assert plain.peak == 16 * NUMBER
    assert estimate_from_plan(LLAMA, Settings(dtype="fp32", optimizer="sgd")).fullest.peak == 8 * NUMBER
    offloaded = estimate_from_plan(LLAMA, Settings(zero_stage=1, offload="optimizer")).fullest
    assert offloaded.peak == 4 * NUMBER
    assert sum(part.bytes for part in offloaded.host) == 12 * NUMBER


def test_traffic() -> None:
    def of(stage: int, passes: int = 1, dp_size: int = 8) -> dict[str, int]:
        settings = Settings(dp_size=dp_size, zero_stage=stage, gradient_accumulation_steps=passes)
        return {one.operation: one.bytes // (2 * NUMBER) for one in estimate_from_plan(LLAMA, settings).fullest.traffic}

    assert of(0, dp_size=1) == {}
    assert of(0) == of(0, passes=3) == {"all-reduce": 1}
    assert of(1) == {"all-reduce": 1, "all-gather": 1}
    assert of(2, passes=3) == {"all-reduce": 3, "all-gather": 1}
    assert of(3, passes=3) == {"all-gather": 6, "reduce-scatter": 3}


def test_kinds_of_ranks_of_an_uneven_plan(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=96)
    plan = compile_plan(folder, tp_size=4, uneven=True)
    kinds = kinds_of_ranks(plan)
    assert len(kinds) > 1 and sorted(rank for ranks in kinds for rank in ranks) == [0, 1, 2, 3]
    found = estimate_from_plan(plan, Settings(seq_length=8, dtype="fp32"))
    assert [rank.tp_ranks for rank in found.ranks] == kinds
    assert found.fullest.peak == 16 * max(elements_of_rank(plan, rank) for rank in range(4))


def test_a_number_of_bytes_that_no_memory_has() -> None:
    assert human_bytes(2**40 * 3) == "3.00 TiB"
    assert human_bytes(10**5000).startswith("more than")
