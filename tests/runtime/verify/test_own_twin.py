"""Plans of models that are not from transformers: proven from the command line, and wrong ones are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270), pytest.mark.filterwarnings("ignore")]
OWN = "tests.helpers.own_models"


def call(*words: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


def test_from_the_function_to_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "plan.json"
    sizes = '{"n_layer": 2, "n_embd": 64}'
    result = call("compile", "--module", f"{OWN}:Nano", "--module-args", sizes, "--tp", "2", "-o", output)
    assert result.exit_code == 0, result.output
    plan = Plan.read(output)
    assert plan.model.config is None and any("inferred from the model itself" in note for note in plan.notes)
    assert {entry.style for entry in plan.parameters} == {"column", "row", "vocab", "replicated"}
    result = call("verify", output, "--module", f"{OWN}:Nano")
    assert result.exit_code == 2 and "--module-args" in result.output, result.output
    attributes = tuple(dataclasses.replace(one, values=(8, 8)) for one in plan.module_attributes)
    wrong = dataclasses.replace(plan, module_attributes=attributes)
    output.write_text(wrong.to_json())
    result = call("verify", output, "--module", f"{OWN}:Nano", "--module-args", sizes)
    assert result.exit_code == 1 and "NOT PROVEN" in result.output, result.output


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for words in (["compile", "--tp", "2", "-o", tmp_path / "plan.json"], ["infer"]):
        result = call(*words)
        assert result.exit_code == 2 and "--module package.module:function" in result.output
    result = call("infer", "--small", '{"a": 1}', "--model", tmp_path)
    assert result.exit_code == 2 and "no --module" in result.output
    result = call("infer", "--module", f"{OWN}:Nano", "--module-args", "{")
    assert result.exit_code == 2 and "--module-args" in result.output
    result = call("infer", "--module", f"{OWN}:nothing")
    assert result.exit_code == 2 and "the module has no such function" in result.output
