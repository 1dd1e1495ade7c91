"""Wrappers that no table describes: planned by their language model's preset, once a twin has proven it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from autotp_plan.planner import compile_plan
from autotp_plan.planner.fallback.wrapped_preset import wrapped_preset
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.planner.wrappers.wrapper import preset_of_text, wrapper_types
from autotp_plan.schemas.errors import CompileError
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.sources.model_folder import model_folder
from tests.helpers.wrappers import OTHERS, save_wrapper
from tests.planner.fallback.test_tp_plan import right
from tests.planner.wrappers.test_wrapper import bare, layouts


@dataclass
class Wrong:
    """What a twin shows of a plan that is wrong."""

    partial_gradients: Sequence[str] = ()
    problem: str | None = None


@pytest.mark.parametrize("variant", OTHERS)
def test_the_language_model_is_planned_as_by_itself(tmp_path: Path, variant: str) -> None:
    folder = save_wrapper(tmp_path / "wrapper", variant)
    assert variant not in wrapper_types()
    found = wrapped_preset(ModelInput(model_folder(folder)))
    assert found is not None
    plan = compile_plan(folder, tp_size=2, prove=right)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"model_type": preset_of_text(config["text_config"]["model_type"])}
    text |= {"tie_word_embeddings": bool(plan.tied), "architectures": None}
    if variant == "glm46v":  # its heads are as wide as the hidden size says; a glm4's are 128
        text["head_dim"] = 8
    expected = compile_plan(bare(tmp_path / "alone", text), tp_size=2)
    wrapper = found.wrapper
    assert layouts(plan, f"{wrapper.language_model}.") == layouts(expected, "model.")
    assert layouts(plan, f"{wrapper.head}.") == layouts(expected, "lm_head.")
    around = [e for e in plan.expanded() if not e.name.startswith((wrapper.language_model, wrapper.head))]
    assert around and {(e.style, e.partial_gradient) for e in around} == {("replicated", False)}
    assert {e.rule.origin for e in plan.parameters if e.style != "replicated"} == {Origin.PRESET}
    assert any("a twin of the model" in note for note in plan.notes)
    assert any("replicated on every rank" in note for note in plan.notes)
    on_disk = load_file(folder / "model.safetensors").keys()
    assert {name for entry in plan.expanded() for name in entry.names_on_disk()} == set(on_disk)


def test_it_is_planned_only_with_proof(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "model", "got_ocr2")
    with pytest.raises(CompileError, match="a plan without a preset needs proof"):
        compile_plan(folder, tp_size=2)
    with pytest.raises(CompileError, match=r"language model inside of this model is wrong\n(.*\n)*.*off by 3"):
        compile_plan(folder, tp_size=2, prove=lambda plan: Wrong(problem="off by 3"))
    with pytest.raises(CompileError, match="gradients that stay partial"):
        compile_plan(folder, tp_size=2, prove=lambda plan: Wrong(partial_gradients=(r"model\.vision_tower.*",)))


def test_a_live_model_is_planned_as_its_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folder = save_wrapper(tmp_path / "model", "lighton_ocr")
    live = AutoModelForImageTextToText.from_pretrained(folder)
    ours, expected = (compile_plan(model, tp_size=2, prove=right) for model in (live, folder))
    assert layouts(ours) == layouts(expected)
