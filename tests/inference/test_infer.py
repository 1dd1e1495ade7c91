"""Inference against the presets: what the model itself shows is what people wrote down about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_plan.inference.infer import infer_rules, infer_spec
from autotp_plan.planner import compile_plan
from autotp_plan.schemas.errors import CheckpointError, CompileError
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.models import PRESET_VARIANTS, make_config
from tests.helpers.paths import PLANS

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]


class Unproven:
    """Stands for a proof: what is planned here is compared with presets, which are proven."""

    partial_gradients: tuple[str, ...] = ()
    problem: str | None = None


def config_folder(folder: Path, variant: str, **changes: Any) -> Path:
    from transformers import AutoModelForCausalLM

    config = make_config(variant, **changes)
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config)).__name__
    values = {**json.loads(config.to_json_string()), "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def inferred(folder: Path, tp_size: int, rules: SpecFile) -> Plan:
    return compile_plan(folder, tp_size=tp_size, preset="infer", infer=lambda _: rules, prove=lambda _: Unproven())


def facts(plan: Plan) -> dict[str, Any]:
    """What a plan says, without the names of its rules and the way in which it groups what is equal."""
    found: dict[str, Any] = {}
    for entry in plan.expanded():
        layout = plan.layouts[entry.layout]
        held = (layout.dim, layout.intervals) if layout.dim is not None else None
        flags = (entry.gather_output, entry.partial_gradient, entry.add_once, entry.split_input)
        found[entry.name] = (entry.style, held, flags)
    for attribute in plan.module_attributes:
        for module in expand(attribute.module):
            found[f"{module}:{attribute.attribute}"] = attribute.values
    for planned in plan.modules:
        for module in expand(planned.module):
            found[f"{module}()"] = (planned.inputs, planned.output, planned.mean_over_ranks)
    for tie in plan.tied:
        found[f"{tie.name} tied"] = (tie.to, tie.style)
    return found


@pytest.mark.parametrize("variant", PRESET_VARIANTS)
def test_inference_finds_what_the_preset_says(tmp_path: Path, variant: str) -> None:
    """The same layouts, attributes, collectives and partial gradients, whatever the number of ranks."""
    folder = config_folder(tmp_path, variant)
    rules = infer_rules(folder)
    for tp_size in (2, 4):
        assert facts(inferred(folder, tp_size, rules)) == facts(compile_plan(folder, tp_size=tp_size))


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt_oss"])
def test_inferred_rules_replicate_key_value_heads(tmp_path: Path, variant: str) -> None:
    """Eight ranks for four key-value heads."""
    folder = config_folder(tmp_path, variant)
    assert facts(inferred(folder, 8, infer_rules(folder))) == facts(compile_plan(folder, tp_size=8))


@pytest.mark.parametrize("variant", ["qwen3", "falcon_grouped", "deepseek_v2"])
def test_inferred_rules_hold_for_other_sizes(tmp_path: Path, variant: str) -> None:
    """A spec file names keys of the config, not numbers: it plans a larger model of the family too."""
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    rules = infer_rules(config_folder(tmp_path / "small", variant))
    changes: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 16, "vocab_size": 512}
    if variant == "deepseek_v2":
        changes |= {"kv_lora_rank": 48, "qk_nope_head_dim": 24, "v_head_dim": 20, "num_key_value_heads": 16}
    elif variant == "falcon_grouped":
        changes |= {"num_kv_heads": 8}
    else:
        changes |= {"head_dim": 24, "num_key_value_heads": 8, "intermediate_size": 80}
    large = config_folder(tmp_path / "large", variant, **changes)
    assert facts(inferred(large, 2, rules)) == facts(compile_plan(large, tp_size=2))


def test_the_spec_file_is_readable(tmp_path: Path) -> None:
    spec = infer_spec(config_folder(tmp_path, "phi3"))
    (qkv,) = (rule for rule in spec["layer_specs"] if "qkv_proj" in rule["patterns"][0])
    size = "head_dim * num_key_value_heads"
    assert qkv["shape"] == [["hidden_size", size, size], -1]
    group = "num_attention_heads // gcd(num_attention_heads, max(num_key_value_heads, tp_size))"
    assert qkv["unit"] == [f"head_dim * ({group})", "head_dim", "head_dim"]
    assert qkv["indivisible"] == ["error", "replicate", "replicate"]
    assert spec["symbols"] == {
        "head_dim": "hidden_size // num_attention_heads",
        "num_key_value_heads": ["num_key_value_heads", "num_attention_heads"],
    }
    assert SpecFile.from_dict(spec).num_layers == "num_hidden_layers"


def test_inferred_rules_need_a_proof(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "llama")
    rules = infer_rules(folder)
    with pytest.raises(CompileError, match="needs proof"):
        compile_plan(folder, tp_size=2, preset="infer", infer=lambda _: rules)
    with pytest.raises(CompileError, match="no way to infer"):
        compile_plan(folder, tp_size=2, preset="infer", prove=lambda _: Unproven())
    wrong = Unproven()
    wrong.problem = "logits differ"
    with pytest.raises(CompileError, match="inferred for this model are wrong") as refused:
        compile_plan(folder, tp_size=2, preset="infer", infer=lambda _: rules, prove=lambda _: wrong)
    assert refused.value.faults[0].got == "logits differ"


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    """A model that transformers does not know."""
    folder = config_folder(tmp_path, "mpt")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**values, "model_type": "unheard_of", "architectures": ["Nothing"]})
    )
    with pytest.raises(CheckpointError, match="transformers does not have this model"):
        infer_spec(folder)


@pytest.mark.parametrize("name", ["bloom_176b", "falcon_40b", "llama_3_1_8b", "qwen3_30b_a3b"])
def test_public_models(name: str) -> None:
    """Configs as they are published: keys that are left out, or that have another name than in transformers."""
    folder = PLANS / name
    assert facts(inferred(folder, 2, infer_rules(folder))) == facts(compile_plan(folder, tp_size=2))


@pytest.mark.parametrize(
    ("model_type", "name"), [("t5", "T5"), pytest.param("whisper", "Whisper", marks=pytest.mark.slow)]
)
def test_an_encoder_decoder_that_needs_a_second_sequence_is_refused(tmp_path: Path, model_type: str, name: str) -> None:
    from transformers import AutoConfig

    values = json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    values["architectures"] = [f"{name}ForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CompileError, match="an encoder-decoder, whose decoder reads a second sequence"):
        infer_spec(tmp_path)
