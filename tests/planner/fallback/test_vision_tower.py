"""Rules for a vision tower: which layers are sharded and how, what stays replicated and why, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.schemas.errors import CompileError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.rule_ref import Origin
from tests.helpers.checkpoints import write_llama
from tests.helpers.wrappers import SIGLIP, TEXT, save_wrapper
from tests.planner.fallback.test_tp_plan import right

SHARDED = {
    "gemma3": ("model.vision_tower.encoder.layers", "self_attn", "mlp"),
    "llava": ("model.vision_tower.encoder.layers", "self_attn", "mlp"),
    "mistral3": ("model.vision_tower.transformer.layers", "attention", "feed_forward"),
    "qwen2_5_vl": ("model.visual.blocks", "attn", "mlp"),
    "qwen3_vl": ("model.visual.blocks", "attn", "mlp"),
    "internvl": ("model.vision_tower.encoder.layer", "attention", "mlp"),
    "llama4": ("vision_model.model.layers", "self_attn", "mlp"),
    "idefics2": ("model.vision_model.encoder.layers", "self_attn", "mlp"),
}


@dataclass
class Seen:
    """What a twin shows."""

    partial_gradients: tuple[str, ...] = ()
    problem: str | None = None
    ungraded: tuple[str, ...] = ()


def tower(plan: Plan) -> set[str]:
    """The modules of the tower that are sharded."""
    return {
        entry.name.rpartition(".")[0].rpartition(".")[0]
        for entry in plan.parameters
        if entry.style != "replicated" and entry.rule.origin is Origin.INFERENCE
    }


@pytest.mark.parametrize("variant", SHARDED)
def test_attention_and_mlps_are_sharded(tmp_path: Path, variant: str) -> None:
    folder = save_wrapper(tmp_path, variant)
    plan = compile_plan(folder, tp_size=2, prove=right, cut_vision=True)
    layers, *kinds = SHARDED[variant]
    found = {name.partition("{")[0] + name.rpartition("}.")[2] for name in tower(plan)}
    assert found >= {f"{layers}.{kind}" for kind in kinds}
    assert {one.attribute for one in plan.module_attributes if one.module.startswith(layers)} == {"num_heads"}
    for entry in plan.expanded():
        owner = entry.name.rpartition(".")[0]
        if entry.name.endswith(".bias") and entry.name.startswith(layers):
            weight = next(one for one in plan.expanded() if one.name == f"{owner}.weight")
            assert (entry.style == "column") is (weight.style == "column"), entry.name
    assert any(note.startswith("--cut-vision: sharded, and proven with images") for note in plan.notes)
    # without the option, and in the language model with it, nothing is different
    plain = compile_plan(folder, tp_size=2, prove=right)
    kept = {entry.name: entry.style for entry in plain.expanded()}
    changed = {e.name for e in plan.expanded() if kept[e.name] != e.style}
    assert changed and all(kept[name] == "replicated" for name in changed) and not tower(plain)


def test_a_fused_projection_is_sharded_by_heads_in_each_third(tmp_path: Path) -> None:
    plan = compile_plan(save_wrapper(tmp_path, "qwen2_5_vl"), tp_size=2, prove=right, cut_vision=True)
    entries = {entry.name: plan.layouts[entry.layout] for entry in plan.expanded()}
    qkv, proj = (entries[f"model.visual.blocks.0.attn.{name}.weight"] for name in ("qkv", "proj"))
    assert qkv.intervals == (((0, 16), (32, 48), (64, 80)), ((16, 32), (48, 64), (80, 96)))
    assert proj.dim == 1 and proj.intervals == (((0, 16),), ((16, 32),))
    assert entries["model.visual.blocks.0.attn.qkv.bias"].intervals == qkv.intervals


def test_heads_that_do_not_divide_stay_replicated_with_the_reason(tmp_path: Path) -> None:
    plan = compile_plan(save_wrapper(tmp_path, "gemma3"), tp_size=8, prove=right, cut_vision=True)
    assert {name.rpartition(".")[2] for name in tower(plan)} == {"mlp"}
    assert "self_attn stays replicated: its 4 heads do not divide by 8." in plan.notes[-1]
    config = {**SIGLIP, "intermediate_size": 50}
    folder = save_wrapper(tmp_path / "odd", "gemma3", vision_config=config)
    with pytest.raises(CompileError, match=r"its 50 features do not divide by 8"):
        compile_plan(folder, tp_size=8, prove=right, cut_vision=True)


def test_what_has_no_gradient_is_not_proven_and_stays_replicated(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path, "gemma3")
    proofs: list[Plan] = []

    def prove(plan: Plan) -> Seen:
        proofs.append(plan)
        return Seen(ungraded=(r"model\.vision_tower\.encoder\.layers\.\d+\.mlp\.fc1\.weight$",))

    plan = compile_plan(folder, tp_size=2, prove=prove, cut_vision=True)
    assert len(proofs) == 2 and {name.rpartition(".")[2] for name in tower(plan)} == {"self_attn"}
    assert "the loss of a text with images does not depend on it" in plan.notes[-1]
    with pytest.raises(CompileError, match="the loss of a text with images does not depend on it"):
        compile_plan(folder, tp_size=2, prove=lambda _: Seen(ungraded=(r".*vision_tower.*",)), cut_vision=True)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (Seen(problem="off by 3"), "off by 3"),
        (Seen(partial_gradients=(r"model\.x$",)), r"gradients that stay partial: model\\\.x\$"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, seen: Seen, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        compile_plan(save_wrapper(tmp_path, "gemma3"), tp_size=2, prove=lambda _: seen, cut_vision=True)


def test_it_takes_a_proof_and_a_tower(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "gemma3", "gemma3")
    with pytest.raises(CompileError, match="no way to try the plan"):
        compile_plan(folder, tp_size=2, cut_vision=True)
    llama = write_llama(tmp_path / "llama")
    with pytest.raises(CompileError, match="a model without a language model inside"):
        compile_plan(llama, tp_size=2, prove=right, cut_vision=True)


def test_a_users_rule_for_the_tower_comes_first(tmp_path: Path) -> None:
    rules: dict[str, Any] = {
        "layer_specs": [{"patterns": [r"model\.vision_tower\..*\.mlp\..*"], "partition_type": "skip"}]
    }
    plan = compile_plan(
        save_wrapper(tmp_path, "llava"), tp_size=2, prove=right, cut_vision=True, specs=[SpecFile.from_dict(rules)]
    )
    assert {name.rpartition(".")[2] for name in tower(plan)} == {"self_attn"}


def test_a_tower_around_a_language_model_without_a_preset(tmp_path: Path) -> None:
    """The language model is planned by transformers' tp_plan, the tower by its own layers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "cohere2_vision", vision_config=SIGLIP, text_config={**TEXT, "model_type": "cohere2"}, downsample_factor=2,
        image_token_id=250,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    plan = compile_plan(tmp_path, tp_size=2, prove=right, cut_vision=True)
    assert {name.rpartition(".")[2] for name in tower(plan)} == {"self_attn", "mlp"}
    origins = {e.rule.origin for e in plan.expanded() if "language_model" in e.name and e.style == "column"}
    assert origins == {Origin.TP_PLAN}
