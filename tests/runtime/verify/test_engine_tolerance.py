"""How far the engine may be off: by a fixed number, or by what rounding makes of the unsharded model's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotp_plan.runtime.verify.report import ENGINE_TOLERANCE, MOST_ROUNDING, Proof
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.paths import PLANS

PROOF = Proof(
    plan=Plan.read(next(iter(sorted(PLANS.glob("*/*tp2*.json"))))),
    twin={"attention": ["eager"]},
    float64={"eager": {"loss": {"pass 1": 1e-15}}},
)


@pytest.mark.parametrize(
    ("rounding", "tolerance"), [(0.0, ENGINE_TOLERANCE), (5e-7, ENGINE_TOLERANCE), (5e-6, 5e-5), (0.1, MOST_ROUNDING)]
)
def test_the_tolerance_follows_the_rounding_of_the_unsharded_model(rounding: float, tolerance: float) -> None:
    proof = replace(PROOF, twin={**PROOF.twin, "rounding": rounding})
    assert proof.engine_tolerance == pytest.approx(tolerance)
    assert replace(proof, engine={"loss, step 1": 0.9 * tolerance}).proven
    assert not replace(proof, engine={"loss, step 1": 1.1 * tolerance}).proven
    assert not replace(proof, engine={"loss, step 1": 0.0}, float64={"eager": {"loss": {"pass 1": 1e-8}}}).proven
