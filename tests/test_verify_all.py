"""`verify` proves every plan in `plans/` and every preset, at TP 2, 4 and 8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotp_plan.schemas.plan import Plan
from tests.helpers.models import PRESET_VARIANTS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

PLANS = Path(__file__).parent.parent / "plans"
QUICK = {
    "bloom_176b/tp4", "deepseek_v2_lite/tp2", "falcon_7b/tp2", "falcon_40b/tp2", "gemma_2_9b/tp2", "glm_4_9b/tp2",
    "gpt_oss_20b/tp2", "mixtral_8x7b/tp2", "olmo_2_7b/tp2", "phi_3_medium/tp4", "pythia_6_9b/tp2",
    "qwen2_5_0_5b/tp2", "qwen3_30b_a3b/tp2", "starcoder2_15b/tp2",
}  # fmt: skip
"""One plan of each kind; the others are for `make test-all`."""
SLOW = pytest.mark.slow


def plans() -> list[object]:
    found = sorted(path.relative_to(PLANS).with_suffix("").as_posix() for path in PLANS.glob("*/tp*.json"))
    assert set(found) >= QUICK
    return [name if name in QUICK else pytest.param(name, marks=SLOW) for name in found]


def prove(plan: Plan) -> None:
    from autotp_plan.runtime import verify_plan

    proof = verify_plan(plan)
    assert proof.proven, (proof.failure, proof.wrong, proof.float64_error, proof.engine_error)


@pytest.mark.parametrize("name", plans())
def test_a_public_model(name: str) -> None:
    prove(Plan.read(PLANS / f"{name}.json"))


@SLOW
@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("variant", PRESET_VARIANTS)
def test_a_preset(tmp_path: Path, variant: str, tp_size: int) -> None:
    from autotp_plan.planner import compile_plan
    from autotp_plan.schemas.errors import CompileError
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "checkpoint", variant)
    try:
        plan = compile_plan(folder, tp_size=tp_size)
    except CompileError as error:
        heads = json.loads((folder / "config.json").read_text())
        assert tp_size == 8 and "does not divide" in error.faults[0].what, heads
        pytest.skip("the heads do not allow this TP size")
    prove(plan)
