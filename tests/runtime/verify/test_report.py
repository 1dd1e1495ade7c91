"""What a proof concludes from the errors that were found."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from autotp_plan.runtime.verify.report import Pass, Proof
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan.document import ModelIdentity, Parameter, Plan, SequenceParallel
from autotp_plan.schemas.plan.rule_ref import NO_RULE

NORM = "model.norm.weight"


def proof_of(kind: str, name: str, error: float) -> Proof:
    """A proof in which everything is right but one number."""
    plan = Plan(
        model=ModelIdentity(model_type="llama", architecture=None, config={}, inventory="sha256:" + "0" * 64),
        tp_size=2,
        layouts={"8 whole": Layout(shape=(8,))},
        parameters=(Parameter(name=NORM, layout="8 whole", dtype="F32", style="replicated", rule=NO_RULE),),
    )
    errors: dict[str, dict[str, float]] = {kind: {at.value: 0.0 for at in Pass} for kind in ("loss", "logits")}
    errors |= {kind: {NORM: 0.0} for kind in ("gradient", "accumulated", "stepped")}
    errors[kind][name] = error
    twin: dict[str, Any] = {"attention": ["eager"], "refused": {}, "ungraded": [], "divisor": 4, "num_parameters": 8}
    return Proof(
        plan=plan, twin=twin, float64={"eager": errors}, engine={"loss, step 1": 0.0, "gradient norm, step 1": 0}
    )


def test_a_proof_holds_when_every_error_is_small() -> None:
    assert proof_of("loss", "pass 1", 1e-12).proven and proof_of("loss", "pass 1", 1e-12).wrong == []


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        ("loss", "pass 1", ["loss"]),
        ("logits", "pass 2", ["logits"]),
        ("gradient", NORM, [NORM]),
        ("accumulated", NORM, [NORM]),
        ("logits", "pass 3", []),
        ("stepped", NORM, []),
    ],
)
def test_what_is_wrong_is_named_unless_an_optimizer_step_came_before(kind: str, name: str, wrong: list[str]) -> None:
    proof = proof_of(kind, name, 1e-6)
    assert proof.wrong == wrong
    assert not proof.proven


def test_an_infinite_error_is_null_in_json() -> None:
    found = json.loads(json.dumps(proof_of("gradient", NORM, float("inf")).to_dict(), allow_nan=False))
    assert found["proven"] is False and found["float64"]["largest"] is None
    assert found["float64"]["errors"]["eager"]["gradient"] == {NORM: None}
    assert found["float64"]["errors"]["eager"]["loss"] == {"pass 1": 0.0, "pass 2": 0.0, "pass 3": 0.0}


def test_a_report_says_that_the_stream_was_sharded() -> None:
    proof = proof_of("loss", "pass 1", 0.0)
    assert not any("sequence" in line for line in proof.conclusions())
    assert proof.to_dict()["sequence_parallel"] is False
    section = SequenceParallel(layers=("layers.0",), gather=("layers.0.a",), scatter=("layers.0.a",), end="model.norm")
    sharded = dataclasses.replace(proof, plan=dataclasses.replace(proof.plan, sequence_parallel=section))
    assert sharded.conclusions()[0] == (
        "the stream was sharded along the sequence: each rank held its tokens alone between the blocks"
    )
    assert sharded.to_dict()["sequence_parallel"] is True
