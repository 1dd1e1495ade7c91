"""`compile --sequence-parallel` of a plan that no preset made alone: proven by ranks that run, or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autotp_plan.planner import compile_plan, proven_stream
from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from autotp_plan.runtime import try_plan
from autotp_plan.schemas.errors import CompileError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.models import save_checkpoint

REPLICATED_HEAD = SpecFile.from_dict({"layer_specs": [{"patterns": [r".*lm_head\.weight$"], "partition_type": "skip"}]})


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_plan_by_a_spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is right; with an end too early it is refused."""
    folder = save_checkpoint(tmp_path / "model", "llama")
    plan = compile_plan(folder, tp_size=2, sequence_parallel=True, specs=[REPLICATED_HEAD], prove=try_plan)
    assert plan.sequence_parallel is not None

    def too_short(given: Plan) -> Plan:
        """The last norm is given every token, and its gradient is summed all the same."""
        found = with_sequence_parallel(given)
        assert found.sequence_parallel is not None
        section = dataclasses.replace(found.sequence_parallel, end="model.layers.1")
        return dataclasses.replace(found, sequence_parallel=section)

    monkeypatch.setattr(proven_stream, "with_sequence_parallel", too_short)
    with pytest.raises(CompileError, match=r"model\.norm\.weight differ from the unsharded model's"):
        compile_plan(folder, tp_size=2, sequence_parallel=True, specs=[REPLICATED_HEAD], prove=try_plan)
