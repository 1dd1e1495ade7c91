"""Inferred rules from the command line to the proof: right ones are proven, and ones that were changed are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.schemas.spec import SpecFile
from tests.inference.test_infer import Unproven, config_folder
from tests.runtime.verify.test_verify_every_plan import SLOW, stable_lm

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
    with pytest.raises(CompileError, match=r"given up(.|\n)*exit status 44"):
        infer_with_limits(tmp_path, 60)


WRONG: dict[str, Any] = {
    "glm": ("mlp.gate_up_proj", {"shape": [["2 * intermediate_size"], -1], "unit": 2}),
    "phi3": ("self_attn.qkv_proj", {"shape": [["hidden_size + 2 * head_dim * num_key_value_heads"], -1], "unit": 32,
                                    "indivisible": "error"}),
    "gpt_neox": ("attention.query_key_value", {"shape": [3, -1], "unit": "head_dim"}),
    "gpt_oss": ("experts.gate_up_proj", {"shape": [-1, -1, ["intermediate_size", "intermediate_size"]], "unit": 1}),
    "qwen3": ("self_attn.q_norm", {"grad_allreduce": False}),
}  # fmt: skip
"""For a variant the rule that is changed, and how: each is sound arithmetic, and passes all checks of a plan."""


@pytest.mark.parametrize("variant", ["glm", *(pytest.param(one, marks=SLOW) for one in WRONG if one != "glm")])
def test_a_changed_rule_is_caught(tmp_path: Path, variant: str) -> None:
    from autotp_plan.inference.infer import infer_spec
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import verify_plan

    folder = config_folder(tmp_path, variant)
    spec = infer_spec(folder)
    part, change = WRONG[variant]
    rules = [rule for rule in spec["layer_specs"] if any(part.replace(".", r"\.") in p for p in rule["patterns"])]
    assert rules
    for rule in rules:
        if "shape" not in change or len(rule["shape"]) == len(change["shape"]):
            rule.update(change)
    plan = compile_plan(
        folder, tp_size=2, preset="infer", infer=lambda _: SpecFile.from_dict(spec), prove=lambda _: Unproven()
    )
    assert not verify_plan(plan).proven
