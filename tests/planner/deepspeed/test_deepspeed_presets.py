"""DeepSpeed's own presets, and the pattern its documentation shows for Pythia, given as a DeepSpeed config.

Five of the seven presets are wrong on the models of today's transformers. Here each compiles to the plan that the model
needs, with a note on what was corrected, or is refused with the reason.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import Plan, compile_plan
from autotp_plan.planner.deepspeed.read_config import parse_section
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
def test_a_preset_of_deepspeed_compiles_as_our_preset(checkpoints: dict[str, Path], preset: str, variant: str) -> None:
    plan = compile_plan(checkpoints[variant], deepspeed=parse_section({"autotp_size": 2, "preset_model": preset}))
    assert cuts(plan) == cuts(compile_plan(checkpoints[variant], tp_size=2))
    told = [note for note in plan.notes if f"preset_model {preset!r}" in note]
    assert bool(told) != ((preset, variant) in RIGHT and preset == plan.model.model_type), plan.notes
    if (preset, variant) not in RIGHT:
        assert any("DeepSpeed's own" in note for note in told), told


NO_MATCH, UNDECIDED = "a pattern matches no parameter", "no rule decides a weight"
MISREAD = "a rule splits a fused weight in the wrong place"
CORRECTED = {
    ("llama", "llama"): None,
    ("llama", "mistral"): None,
    ("qwen2", "qwen2"): None,
    ("llama", "qwen3"): "would not sum them",
    ("llama", "gemma3_text"): "would not sum them",
    ("llama", "olmo2"): "means must be taken over all ranks",
    ("bloom", "bloom"): "ALiBi",
    ("bloom", "falcon_grouped"): "in place",
    ("bloom", "falcon_alibi"): "ALiBi",
    ("qwen2", "qwen2_moe"): "fused experts",
}
"""What a plan by the preset's own patterns notes; None where DeepSpeed is right. All other pairs are refused."""
REFUSED = {
    ("phi3", "phi3"): "the dimension is not equal sub-parameters",
    ("bloom", "falcon_multi_query"): MISREAD,
    ("chatglm", "bloom"): MISREAD,
}
"""Where not because a pattern matches nothing."""


def patterns_of(preset: str) -> list[dict[str, Any]]:
    """A preset of DeepSpeed as one would write it in a partition_config."""
    from deepspeed.module_inject.autotp_config import AutoTPPresets

    specs: list[dict[str, Any]] = []
    for spec in AutoTPPresets.get_preset(preset).layer_specs:
        specs.append({"patterns": list(spec.patterns), "partition_type": spec.partition_type.value})
        if spec.shape is not None:
            specs[-1] |= {"shape": list(spec.shape), "partition_dim": spec.partition_dim}
    return specs


def by_patterns(folder: Path, specs: list[dict[str, Any]], use_default_specs: bool, strict: bool = False) -> Plan:
    partition = {"use_default_specs": use_default_specs, "layer_specs": specs}
    section = parse_section({"autotp_size": 2, "partition_config": partition})
    return compile_plan(folder, deepspeed=section, strict=strict)


@pytest.mark.parametrize("use_default_specs", [True, False])
@pytest.mark.parametrize(("preset", "variant"), PAIRS)
def test_patterns_of_a_preset_compile_right_or_are_refused_when_strict(
    checkpoints: dict[str, Path], preset: str, variant: str, use_default_specs: bool
) -> None:
    """Right, with a note on what DeepSpeed would have done, or refused with the reason."""
    pair, specs = (preset, variant), patterns_of(preset)
    if pair not in CORRECTED or (pair == ("qwen2", "qwen2_moe") and not use_default_specs):
        with pytest.raises(CompileError) as refused:
            by_patterns(checkpoints[variant], specs, use_default_specs, strict=True)
        whats = {fault.what for fault in refused.value.faults}
        expected = REFUSED.get(pair, UNDECIDED if pair in CORRECTED else NO_MATCH)
        assert expected in whats and whats <= {expected, UNDECIDED}
        return
    plan = by_patterns(checkpoints[variant], specs, use_default_specs, strict=True)
    assert cuts(plan) == cuts(compile_plan(checkpoints[variant], tp_size=2))
    note = CORRECTED[pair]
    assert not plan.notes if note is None else any(note in one for one in plan.notes), plan.notes


@pytest.mark.parametrize(("preset", "variant"), PAIRS)
def test_patterns_of_a_preset_that_match_nothing_are_completed(
    checkpoints: dict[str, Path], preset: str, variant: str
) -> None:
    """The preset decides what they leave open, and each of them is noted; a misread weight stays an error."""
    pair, specs = (preset, variant), patterns_of(preset)
    if pair in REFUSED:
        with pytest.raises(CompileError) as refused:
            by_patterns(checkpoints[variant], specs, use_default_specs=True)
        assert REFUSED[pair] in {fault.what for fault in refused.value.faults}
        return
    plan = by_patterns(checkpoints[variant], specs, use_default_specs=True)
    assert cuts(plan) == cuts(compile_plan(checkpoints[variant], tp_size=2))
    assert (pair in CORRECTED) != any("matches no parameter" in note for note in plan.notes), plan.notes


SHARE_LEFT_WHOLE = {
    ("llama", "gpt_oss"): "47.7",
    ("qwen2", "qwen2_moe"): "55.6",
    ("qwen2", "qwen3_moe"): "47.4",
    ("bloom", "gpt_neox"): "36.3",
    ("chatglm", "glm"): "72.3",
    ("chatglm", "glm4"): "72.2",
    ("mixtral", "mixtral"): "72.0",
    ("deepseek_v2", "deepseek_v2"): "34.2",
    ("deepseek_v2", "deepseek_v3"): "36.3",
}
"""Percent of the model that no pattern names. `verify` has proven these plans too."""
TORN = {("llama", "phi"), ("phi3", "glm"), ("deepseek_v2", "deepseek_v2_lite")}
"""Patterns that shard one half of an attention module: wrong in DeepSpeed."""


@pytest.mark.parametrize(("preset", "variant"), PAIRS)
def test_what_patterns_of_a_preset_leave_open_stays_whole(
    checkpoints: dict[str, Path], preset: str, variant: str
) -> None:
    pair, specs = (preset, variant), patterns_of(preset)
    if pair in TORN or pair in REFUSED:
        with pytest.raises(CompileError) as refused:
            by_patterns(checkpoints[variant], specs, use_default_specs=False)
        expected = REFUSED.get(pair, "a weight is replicated where the rest of its module is sharded")
        assert {fault.what for fault in refused.value.faults} == {expected}
        return
    plan = by_patterns(checkpoints[variant], specs, use_default_specs=False)
    told = [note for note in plan.notes if "because no rule names them" in note]
    assert len(told) == (pair in SHARE_LEFT_WHOLE)
    assert pair not in SHARE_LEFT_WHOLE or f"({SHARE_LEFT_WHOLE[pair]} % of the model)" in told[0]
    named = {entry.name for entry in plan.parameters if str(entry.rule) != "no rule"}
    ours = {entry.name: entry.style for entry in compile_plan(checkpoints[variant], tp_size=2).expanded()}
    for entry in plan.expanded():
        whole = entry.style == "replicated"
        assert ours[entry.name] == entry.style or (whole and str(entry.rule) == "no rule"), entry
    assert named


@pytest.mark.parametrize("use_default_specs", [True, False])
@pytest.mark.parametrize("shape", [[[64, 64, 64], -1], [3, -1]])
def test_the_documented_pattern_for_pythia(
    tmp_path: Path, checkpoints: dict[str, Path], shape: list[Any], use_default_specs: bool
) -> None:
    """GPT-NeoX's weight is q, k, v of each head in turn; cut as [Q; K; V] the logits are off by 0.9, without a word."""
    specs: list[dict[str, Any]] = [
        {"patterns": [r".*\.query_key_value\.weight$"], "partition_type": "column", "shape": shape, "partition_dim": 0},
        {"patterns": [r".*\.dense_h_to_4h\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.attention\.dense\.weight$", r".*\.dense_4h_to_h\.weight$"], "partition_type": "row"},
    ]
    with pytest.raises(CompileError) as refused:
        by_patterns(checkpoints["gpt_neox"], specs, use_default_specs)
    assert {fault.what for fault in refused.value.faults} == {MISREAD}
    assert "[64, 64, 64]" in refused.value.faults[0].got and "[192] along dim 0" in refused.value.faults[0].expected
    for spec in specs[:1]:
        del spec["shape"], spec["partition_dim"]
    plan = by_patterns(checkpoints["gpt_neox"], specs, use_default_specs)
    assert cuts(plan) == cuts(compile_plan(checkpoints["gpt_neox"], tp_size=2)) and not plan.notes


@pytest.mark.parametrize("variant", ["glm", "glm4"])
def test_chatglm_names_the_presets_of_glm(checkpoints: dict[str, Path], variant: str) -> None:
    for plan in (
        compile_plan(checkpoints[variant], tp_size=2, preset="chatglm"),
        compile_plan(checkpoints[variant], deepspeed=parse_section({"autotp_size": 2, "preset_model": "ChatGLM"})),
    ):
        assert cuts(plan) == cuts(compile_plan(checkpoints[variant], tp_size=2))
        assert "matches nothing in this family" in plan.notes[0]


@pytest.mark.parametrize("by_config", [True, False])
def test_the_model_chatglm_itself_is_refused(checkpoints: dict[str, Path], tmp_path: Path, by_config: bool) -> None:
    """Its code is not in transformers: how its fused weights lie would be a guess."""
    config = json.loads((checkpoints["glm"] / "config.json").read_text())
    folder = shutil.copytree(checkpoints["glm"], tmp_path / "chatglm")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "chatglm"}))
    with pytest.raises(CompileError) as refused:
        if by_config:
            compile_plan(folder, deepspeed=parse_section({"autotp_size": 2, "preset_model": "chatglm"}))
        else:
            compile_plan(folder, tp_size=2, preset="chatglm")
    (fault,) = refused.value.faults
    assert fault.where == ("tensor_parallel.preset_model" if by_config else "--preset")
    assert "not for models of remote code" in fault.expected and "not guessed" in fault.next
