"""What presets refuse: variants of an architecture that they do not cover must never be cut on a guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.schemas.errors import CompileError
from tests.helpers.models import make_config


def config_folder(tmp_path: Path, variant: str, architecture: str, **changes: object) -> Path:
    values = make_config(variant, **changes).to_dict() | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_cohere_cuts_the_norms_of_its_heads(tmp_path: Path) -> None:
    plan = compile_plan(config_folder(tmp_path, "cohere", "CohereForCausalLM", use_qk_norm=True), tp_size=2)
    styles = {entry.name: entry.style for entry in plan.parameters}
    assert styles["model.layers.{0..1}.self_attn.q_norm.weight"] == "shard"
    assert styles["model.layers.{0..1}.self_attn.k_norm.weight"] == "shard"


def test_the_partial_gradients_of_phi_follow_its_config(tmp_path: Path) -> None:
    plan = compile_plan(config_folder(tmp_path, "phi", "PhiForCausalLM"), tp_size=2)
    assert not any(entry.partial_gradient for entry in plan.parameters)
    plan = compile_plan(config_folder(tmp_path, "phi", "PhiForCausalLM", qk_layernorm=True), tp_size=2)
    assert sum(entry.partial_gradient for entry in plan.parameters) == 4


def test_a_model_without_a_preset_is_refused_with_the_rules_to_write(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "llama", "StableLmForCausalLM", model_type="stablelm")
    with pytest.raises(CompileError) as caught:
        compile_plan(folder, tp_size=2)
    (fault,) = caught.value.faults
    assert fault.what == "there is no preset for this model, and it cannot be planned without one"
    assert "transformers has no tp_plan for it" in fault.got
    skeleton = fault.next[fault.next.index("{") :].replace("column | row | skip", "column")
    assert any("down_proj" in rule["patterns"][0] for rule in json.loads(skeleton)["layer_specs"])


def test_parameters_that_a_preset_does_not_know_are_refused(tmp_path: Path) -> None:
    """An activation function with parameters of its own acts on cut activations: its gradients are partial."""
    folder = config_folder(tmp_path, "llama", "LlamaForCausalLM", hidden_act="xielu")
    with pytest.raises(CompileError) as caught:
        compile_plan(folder, tp_size=2)
    assert {fault.what for fault in caught.value.faults} == {
        "the preset does not know a parameter among weights that are sharded"
    }
    assert "model.layers.{0..1}.mlp.act_fn.alpha_p" in {fault.where for fault in caught.value.faults}
    rules = [
        {"patterns": [r".*\.act_fn\.alpha_[np]$"], "partition_type": "skip", "grad_allreduce": True},
        {"patterns": [r".*\.act_fn\.(beta|eps)$"], "partition_type": "skip"},
    ]
    plan = compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": rules})])
    assert sum(entry.partial_gradient for entry in plan.expanded()) == 4
