"""Code that computes with the weight of a sharded layer and does not call it: the proof says so."""

from __future__ import annotations

import pytest

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.runtime.verify.run import verify_plan
from autotp_plan.schemas.errors import MismatchError
from autotp_plan.schemas.plan.document import Plan

OWN = "tests.helpers.own_models"
RULES = SpecFile.from_dict(
    {
        "layer_specs": [
            {"patterns": ["up.weight$"], "partition_type": "column"},
            {"patterns": ["down.weight$"], "partition_type": "row"},
            {"patterns": ["table.weight$"], "partition_type": "skip"},
        ]
    }
)


def planned(factory: ModuleFactory) -> Plan:
    return compile_plan(factory.on_meta(), tp_size=2, specs=[RULES])


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_a_weight_that_a_function_multiplies_by_is_found() -> None:
    factory = ModuleFactory(name=f"{OWN}:Peeking")
    proof = verify_plan(planned(factory), factory=factory)
    assert not proof.proven
    assert proof.reads.keys() == {"down.weight"} and "multiply (own_models.py:" in proof.reads["down.weight"]
    (line,) = [line for line in proof.conclusions() if "which does not call the layer" in line]
    assert line.startswith("down.weight is read by multiply (own_models.py:")
    assert proof.to_dict()["read_elsewhere"] == dict(proof.reads)


def test_a_weight_that_the_module_around_reads_is_refused() -> None:
    factory = ModuleFactory(name=f"{OWN}:Reading")
    with pytest.raises(MismatchError) as refused:
        check_model(factory.on_meta(), planned(factory))
    (fault,) = refused.value.faults
    assert fault.where == "down.weight" and "self.down.weight in tests.helpers.own_models.Reading" in fault.got
