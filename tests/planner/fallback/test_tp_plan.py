"""Models without a preset: rules from transformers' `tp_plan`, and what a user's rules and a checkpoint add to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from autotp_plan.huggingface.disk_names import disk_names
from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.planner.fallback.skeleton import CHOICE, spec_skeleton
from autotp_plan.planner.fallback.unused_tensors import unused_tensors
from autotp_plan.schemas.errors import CompileError
from autotp_plan.schemas.plan.document import Plan

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256,
    "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4, "n_routed_experts": 4, "head_dim": 16,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def right(plan: Plan) -> Any:
    """A proof that finds nothing wrong, for tests of what is planned; `verify` has tests of its own."""
    return SimpleNamespace(partial_gradients=(), problem=None)


def meta_model(model_type: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **changes}))


def save(folder: Path, model_type: str, **changes: Any) -> Path:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **changes})).save_pretrained(folder)
    return folder


def add_tensors(folder: Path, *names: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **{name: torch.zeros(4, 4) for name in names}}, folder / "model.safetensors")
    return folder


MULTI_TOKEN = {
    "qwen3_next": (("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"), "mtp.**"),
    "glm4_moe": (
        ("model.layers.46.eh_proj.weight", "model.layers.46.mlp.experts.0.gate_proj.weight",
         "model.layers.46.mlp.experts.0.up_proj.weight", "model.layers.46.self_attn.q_proj.weight"),
        "model.layers.46.**",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", MULTI_TOKEN)
def test_tensors_of_multi_token_prediction_are_ignored_and_named(tmp_path: Path, model_type: str) -> None:
    names, pattern = MULTI_TOKEN[model_type]
    plain = compile_plan(save(tmp_path, model_type), tp_size=2, prove=right)
    plan = compile_plan(add_tensors(tmp_path, *names), tp_size=2, prove=right)
    assert (plain.ignored, plan.ignored) == ((), (pattern,))
    assert plan.parameters == plain.parameters
    assert [note for note in plan.notes if pattern in note and "not used" in note]


def test_a_layer_of_the_model_is_not_ignored_whatever_transformers_lists() -> None:
    """transformers lists layer 46 for GLM-4.5-Air, which has 46; GLM-4.5 has 92, and layer 46 is one of them."""
    model = meta_model("glm4_moe", num_hidden_layers=48, hidden_size=16, intermediate_size=8, moe_intermediate_size=8)
    renamed, assembled, _, _ = disk_names(model)
    kept = ["model.layers.46.self_attn.q_proj.weight", "model.layers.46.mlp.experts.0.gate_proj.weight"]
    assert unused_tensors(model, renamed, assembled, kept) == []
    extra = [*kept, "model.layers.92.eh_proj.weight", "model.layers.46.eh_proj.weight"]
    assert unused_tensors(model, renamed, assembled, extra) == ["model.layers.46.eh_proj.**", "model.layers.92.**"]


def test_other_tensors_that_the_model_does_not_have_stay_a_fault(tmp_path: Path) -> None:
    add_tensors(save(tmp_path, "qwen3_next"), "extra.fc.weight")
    with pytest.raises(CompileError, match=r"extra\.fc\.weight"):
        compile_plan(tmp_path, tp_size=2, prove=right)


def test_kv_heads_are_shared_among_ranks_as_by_presets(tmp_path: Path) -> None:
    config = {**SMALL, "num_hidden_layers": 4}
    found = compile_plan(save(tmp_path / "smollm3", "smollm3", num_hidden_layers=4), tp_size=8, prove=right)
    preset = compile_plan(save(tmp_path / "qwen3", "qwen3", **config), tp_size=8)
    layouts = {
        entry.name.partition("self_attn.")[2]: plan.layouts[entry.layout]
        for plan in (found, preset)
        for entry in plan.parameters
        if "_proj" in entry.name and "self_attn" in entry.name
    }
    for entry in found.parameters:
        if entry.name.partition("self_attn.")[2] in layouts:
            expected = layouts[entry.name.partition("self_attn.")[2]]
            assert found.layouts[entry.layout].intervals == expected.intervals, entry.name
    values = {(one.attribute, one.values) for one in found.module_attributes}
    assert values == {(one.attribute, one.values) for one in preset.module_attributes}
    assert values == {("num_key_value_groups", (1,) * 8)}


def test_heads_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="a weight cannot be split evenly"):
        compile_plan(save(tmp_path, "smollm3", num_key_value_heads=3, num_attention_heads=6), tp_size=4, prove=right)


def test_one_rule_of_a_spec_adds_to_what_transformers_says(tmp_path: Path) -> None:
    """It decides its weight; the rest is planned as before, and what must go with it follows."""
    folder = save(tmp_path, "seed_oss")
    plain = compile_plan(folder, tp_size=2, prove=right)
    head = {"patterns": [r"lm_head\.weight$"], "partition_type": "skip"}
    plan = compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": [head]})], prove=right)
    changed = {new.name for new, old in zip(plan.parameters, plain.parameters, strict=True) if new != old}
    assert changed == {"lm_head.weight"}


def test_a_spec_cures_what_transformers_leaves_open(tmp_path: Path) -> None:
    """GPT-Neo has no tp_plan: with a rule for each linear layer, embeddings and norms need none."""
    folder = tmp_path
    config = AutoConfig.for_model(
        "gpt_neo",
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        vocab_size=256,
        attention_types=[[["global"], 2]],
        max_position_embeddings=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(CompileError) as caught:
        compile_plan(folder, tp_size=2, prove=right)
    assert [fault.code for fault in caught.value.faults] == ["no-preset"]
    rules = [
        {"patterns": [r".*\.(q|k|v)_proj\.weight$", r".*\.mlp\.c_fc\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.out_proj\.weight$", r".*\.mlp\.c_proj\.weight$"], "partition_type": "row"},
    ]
    plan = compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": rules})], prove=right)
    styles = {entry.name: entry.style for entry in plan.parameters}
    assert styles["transformer.wte.weight"] == "vocab"
    assert styles["transformer.h.{0..1}.attn.attention.q_proj.weight"] == "column"
    with pytest.raises(CompileError) as caught:
        compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": rules[:1]})], prove=right)
    (fault,) = caught.value.faults
    assert "mlp.c_proj" in fault.got and "c_fc" not in fault.got
    assert "c_fc" not in fault.next


def test_what_is_wrong_in_the_users_rules_comes_first(tmp_path: Path) -> None:
    rules = {"layer_specs": [{"patterns": ["(", "no_such_weight"], "partition_type": "skip"}]}
    config = AutoConfig.for_model("gpt_neo", hidden_size=64, num_layers=2, num_heads=8, vocab_size=256,
                                  attention_types=[[["global"], 2]])  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CompileError) as caught:
        compile_plan(tmp_path, tp_size=2, specs=[SpecFile.from_dict(rules)], prove=right)
    assert {"bad-pattern", "pattern-without-match"} <= {fault.code for fault in caught.value.faults}


def experts_of(plan: Plan) -> dict[str, Any]:
    return {entry.name: plan.layouts[entry.layout].intervals for entry in plan.parameters if ".experts." in entry.name}


def test_the_printed_spec_shards_fused_experts_and_sums_their_output(tmp_path: Path) -> None:
    """Of the experts nothing is left to choose: two `shard` rules, and an entry in `modules`."""
    folder = save(tmp_path, "qwen3_next")
    model = meta_model("qwen3_next")
    spec = json.loads(spec_skeleton(model, {}, lambda name: False))
    rules = {rule["patterns"][0]: rule for rule in spec["layer_specs"]}
    gate_up, down = (next(r for p, r in rules.items() if f"experts\\.{leaf}" in p) for leaf in ("gate_up", "down"))
    assert (gate_up["partition_type"], gate_up["partition_dim"], gate_up["shape"]) == ("shard", 1, [-1, 2, -1])
    assert (down["partition_type"], down["partition_dim"]) == ("shard", 2)
    (module,) = spec["modules"]
    assert (module["inputs"], module["output"]) == ({"hidden_states": "copy", "top_k_weights": "copy"}, "reduce")
    assert re.match(module["patterns"][0], "model.layers.0.mlp.experts")
    # as they are, these rules give the layouts that transformers' own plan gives
    planned = experts_of(compile_plan(folder, tp_size=2, prove=right))
    experts = {"layer_specs": [gate_up, down], "modules": spec["modules"]}
    plan = compile_plan(folder, tp_size=2, specs=[SpecFile.from_dict(experts)], prove=right)
    assert experts_of(plan) == planned and len(planned) == 2
    assert {rule["partition_type"] for rule in spec["layer_specs"]} >= {CHOICE, "shard"}
