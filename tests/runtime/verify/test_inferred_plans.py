"""Inferred rules from the command line to the proof, and the limits under which they are inferred."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.schemas.spec import SpecFile
from tests.inference.test_infer import config_folder
from tests.runtime.verify.test_verify_every_plan import stable_lm

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270), pytest.mark.filterwarnings("ignore")]


def test_a_family_without_a_preset_is_planned_by_inference(tmp_path: Path) -> None:
    """StableLM has neither a preset nor a tp_plan, and its attention holds head counts."""
    folder, output = stable_lm(tmp_path / "model"), tmp_path / "plan.json"
    result = CliRunner().invoke(main, ["compile", "--model", str(folder), "--tp", "2", "-o", str(output)])
    assert result.exit_code == 0, result.output
    plan = Plan.read(output)
    assert any("inferred from the model itself" in note for note in plan.notes)
    assert {entry.rule.origin for entry in plan.parameters} == {Origin.INFERENCE, Origin.DEFAULT}
    assert {attribute.attribute for attribute in plan.module_attributes} == {"num_heads", "num_key_value_heads"}


def test_the_command_writes_a_spec_file(tmp_path: Path) -> None:
    folder, output = stable_lm(tmp_path / "model"), tmp_path / "spec.json"
    result = CliRunner().invoke(main, ["infer", "--model", str(folder), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert SpecFile.read(output).model_types == ("stablelm",)
    result = CliRunner().invoke(main, ["infer", "--model", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_inference_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp_plan.planner.cli.infer import infer_with_limits
    from autotp_plan.schemas.errors import CompileError

    with pytest.raises(CompileError, match="given up"):
        infer_with_limits(config_folder(tmp_path, "gpt2"), 0.05)
    monkeypatch.setattr("autotp_plan.planner.cli.infer.MOST_MEMORY", 1)
    with pytest.raises(CompileError, match=r"given up(.|\n)*exit status 44: it took more than 0.0 GiB of memory"):
        infer_with_limits(tmp_path, 60)


def test_a_users_module_has_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that it asks for at once is refused, what it takes bit by bit ends it, and so does a module that hangs."""
    from autotp_plan.factories.module_factory import ModuleFactory
    from autotp_plan.planner.cli.infer import infer_with_limits
    from autotp_plan.schemas.errors import AutoTPError

    def refusal(name: str, timeout: float) -> str:
        with pytest.raises(AutoTPError) as refused:
            infer_with_limits(ModuleFactory(name=f"tests.helpers.own_models:{name}"), timeout)
        return str(refused.value)

    assert "took more than 2 s" in refusal("endless", 2)
    monkeypatch.setattr("autotp_plan.planner.cli.infer.MOST_MEMORY", 2**28)
    assert "can't allocate memory" in refusal("hungry", 60)
    assert "took more than 0.2 GiB of memory" in refusal("growing", 60)
