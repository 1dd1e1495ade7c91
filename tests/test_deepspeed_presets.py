"""DeepSpeed's own presets, and the pattern its documentation shows for Pythia, given as a DeepSpeed config.

Five of the seven presets are wrong on the models of today's transformers. Here each compiles to the plan that the model
needs, with a note on what was corrected, or is refused with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import Plan, compile_plan
from autotp_plan.planner.deepspeed_config import parse_section
from autotp_plan.schemas.errors import CompileError

FAMILIES = {
    "llama": ("llama", "mistral", "qwen3", "gemma3_text", "phi", "gpt_oss", "olmo2"),
    "qwen2": ("qwen2", "qwen2_moe", "qwen3_moe"),
    "phi3": ("phi3", "glm"),
    "bloom": ("bloom", "gpt_neox", "falcon_multi_query", "falcon_grouped", "falcon_alibi"),
    "chatglm": ("glm", "glm4", "bloom"),
    "mixtral": ("mixtral",),
    "deepseek_v2": ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3"),
}
"""What people give each preset of DeepSpeed for."""
PAIRS = [(preset, variant) for preset, variants in FAMILIES.items() for variant in variants]
RIGHT = {("llama", "llama"), ("llama", "mistral"), ("qwen2", "qwen2")}
"""Where DeepSpeed's preset is right, as far as it goes."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.helpers.models import save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return {variant: save_checkpoint(folder / variant, variant) for variant in {variant for _, variant in PAIRS}}


def cuts(plan: Plan) -> Any:
    """What a plan does to a model, whoever decided it."""
    parameters = {
        entry.name: (
            plan.layouts[entry.layout],
            entry.style,
            entry.gather_output,
            entry.partial_gradient,
            entry.add_once,
        )
        for entry in plan.expanded()
    }
    return parameters, plan.modules, plan.module_attributes, [(tie.name, tie.to, tie.style) for tie in plan.tied]


@pytest.mark.parametrize(("preset", "variant"), PAIRS)
def test_by_name(checkpoints: dict[str, Path], preset: str, variant: str) -> None:
    plan = compile_plan(checkpoints[variant], deepspeed=parse_section({"autotp_size": 2, "preset_model": preset}))
    assert cuts(plan) == cuts(compile_plan(checkpoints[variant], tp_size=2))
    told = [note for note in plan.notes if f"preset_model {preset!r}" in note]
    assert bool(told) != ((preset, variant) in RIGHT and preset == plan.model.model_type), plan.notes
    if (preset, variant) not in RIGHT:
        assert any("DeepSpeed's own" in note for note in told), told


@pytest.mark.parametrize("use_default_specs", [True, False])
@pytest.mark.parametrize(("preset", "variant"), PAIRS)
def test_by_its_patterns(checkpoints: dict[str, Path], preset: str, variant: str, use_default_specs: bool) -> None:
    from deepspeed.module_inject.autotp_config import AutoTPPresets

    specs = []
    for spec in AutoTPPresets.get_preset(preset).layer_specs:
        entry = {"patterns": list(spec.patterns), "partition_type": spec.partition_type.value}
        if spec.shape is not None:
            entry |= {"shape": list(spec.shape), "partition_dim": spec.partition_dim}
        specs.append(entry)
    partition = {"use_default_specs": use_default_specs, "layer_specs": specs}
    section = parse_section({"autotp_size": 2, "partition_config": partition})
    try:
        plan = compile_plan(checkpoints[variant], deepspeed=section)
    except CompileError as refused:
        assert all(fault.what and fault.expected and fault.next for fault in refused.faults)
        assert not ((preset, variant) in RIGHT and use_default_specs)
        return
    assert cuts(plan) == cuts(compile_plan(checkpoints[variant], tp_size=2))
