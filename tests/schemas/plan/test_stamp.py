"""A stamp is bound to its plan: what is changed in it, or taken from another plan, is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.plan_table import describe
from autotp_plan.schemas.errors import DocumentError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.stamp import Stamp
from tests.helpers.checkpoints import write_llama


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """By a spec file, so that it has rules."""
    return compile_plan(write_llama(tmp_path / "llama"), tp_size=2, specs=[SpecFile.from_dict({"symbols": {"a": 1}})])


def stamped(plan: Plan) -> Plan:
    stamp = Stamp(plan=plan.fingerprint, versions={"torch": "2.13.0"}, attention=("eager",), float64_error=2e-15,
                  engine_error=3e-7, twin="sha256:" + "0" * 64)  # fmt: skip
    return dataclasses.replace(plan, verified=plan.sealed(stamp))


def test_a_sealed_stamp_is_read_and_shown(plan: Plan) -> None:
    found = stamped(plan)
    assert plan.rules is not None and found.fingerprint == plan.fingerprint
    assert Plan.from_dict(json.loads(found.to_json())) == found
    assert describe(found)[-1].startswith("verified: eager attention")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("verified", "float64_error"), 1e-16), (("verified", "engine_error"), 0.0),
        (("verified", "attention"), ["sdpa"]),
        (("verified", "versions"), {"torch": "3.0"}), (("verified", "twin"), "sha256:" + "1" * 64),
        (("verified", "seal"), "sha256:" + "2" * 64), (("rules", "uneven"), True), (("rules", "specs"), []),
    ],
)  # fmt: skip
def test_what_is_changed_after_the_proof_is_noticed(plan: Plan, where: tuple[str, str], value: Any) -> None:
    data = json.loads(stamped(plan).to_json())
    data[where[0]][where[1]] = value
    with pytest.raises(DocumentError) as caught:
        Plan.from_dict(data)
    assert [fault.code for fault in caught.value.faults] == ["stamp-changed"]


def test_the_stamp_of_another_plan_is_refused_with_its_name_changed_too(plan: Plan, tmp_path: Path) -> None:
    other = compile_plan(write_llama(tmp_path / "other"), tp_size=4)
    data = json.loads(stamped(plan).to_json())
    forged = {**other.to_dict(), "verified": {**data["verified"], "plan": other.fingerprint}}
    with pytest.raises(DocumentError, match="was changed after the proof"):
        Plan.from_dict(forged)


def test_a_stamp_without_a_seal_is_shown_as_one(plan: Plan) -> None:
    """Of version 0.1, or written by hand."""
    data = json.loads(stamped(plan).to_json())
    del data["verified"]["seal"], data["verified"]["twin"]
    found = Plan.from_dict(data)
    assert describe(found)[-1].startswith("a stamp of version 0.1, which nothing binds to a proof")
    assert json.loads(found.to_json()) == data
