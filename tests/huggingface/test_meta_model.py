"""Configs that transformers cannot build, or only by running a checkpoint's code: errors of ours, no traceback."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.huggingface.meta_model import build_model, names_a_dtype
from autotp_plan.planner.compiler import compile_plan
from autotp_plan.schemas.errors import AutoTPError, CheckpointError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import read_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256, "intermediate_size": 96, "dtype": "bfloat16",
}  # fmt: skip


def write_config(folder: Path, text: str | dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 100, "num_attention_heads": 3}, {"rms_norm_eps": "1e-5"}, {"hidden_act": 7},
        {"rope_parameters": [1]}, {"layer_types": [3]}, {"vocab_size": -5}, {"num_hidden_layers": "two"},
        {"hidden_act": "no such activation"}, {"rope_parameters": {"rope_type": "spiral"}}, {"dtype": 3},
        {"dtype": "nonsense"}, {"text_config": 3}, {"architectures": [3]}, {"tie_word_embeddings": "maybe"},
        {"attention_dropout": "half"}, {"max_position_embeddings": [4]}, {"vocab_size": 2.5},
        {"model_type": "no_such_model"}, {"model_type": 3}, {"quantization_config": 3},
    ],
    ids=repr,
)  # fmt: skip
def test_a_config_that_transformers_refuses_is_an_error_of_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(AutoTPError) as caught:
        compile_plan(write_config(tmp_path, {**LLAMA, **changes}), tp_size=2)
    assert caught.value.faults[0].next


@pytest.mark.parametrize("model_type", ["llama", "code_of_its_own"])
def test_code_of_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """transformers asks on a terminal whether it may run such code; a `y` on stdin is no answer."""
    marker = tmp_path / "it-ran"
    folder = write_config(
        tmp_path / "model",
        {
            **LLAMA, "model_type": model_type, "architectures": ["TheirForCausalLM"],
            "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirForCausalLM"},
        },
    )  # fmt: skip
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    if model_type == "llama":  # transformers has its own class for it
        assert type(build_model(folder, on_meta="all")).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(CheckpointError) as caught:
            build_model(folder, on_meta="all")
        (fault,) = caught.value.faults
        assert fault.code == "remote-code"
        assert "theirs.TheirConfig" in fault.got
        assert "trust" not in str(fault)
    assert not marker.exists()
    assert sys.stdin.read() == "y\ny\ny\n"


def test_infinity_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Nemotron-H's config.json has `"time_step_limit": [0.0, Infinity]`, which is Python and not JSON."""
    text = json.dumps(LLAMA)[:-1]
    config = read_config(write_config(tmp_path, text + ', "limit": [0.0, Infinity], "least": -Infinity}'))
    assert config is not None
    assert config["limit"] == [0.0, {"__float__": "Infinity"}]
    assert config["least"] == {"__float__": "-Infinity"}
    plan = compile_plan(tmp_path, tp_size=2)
    assert Plan.from_dict(json.loads(plan.to_json(), parse_constant=pytest.fail)).model == plan.model
    assert build_model(tmp_path, on_meta="all").config.limit == [0.0, float("inf")]
    with pytest.raises(AutoTPError, match="NaN, which is no value"):
        read_config(write_config(tmp_path, text + ', "limit": NaN}'))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (LLAMA, "BF16"), ({**LLAMA, "dtype": None, "torch_dtype": "float16"}, "F16"),
        ({key: value for key, value in LLAMA.items() if key != "dtype"}, "F32"),
    ],
)  # fmt: skip
def test_the_dtype_is_the_configs_and_one_that_is_assumed_is_said(
    tmp_path: Path, config: dict[str, Any], dtype: str
) -> None:
    plan = compile_plan(write_config(tmp_path, config), tp_size=2)
    assert {entry.dtype for entry in plan.parameters} == {dtype}
    assert any("F32 is assumed" in note for note in plan.notes) == (dtype == "F32")
    assert names_a_dtype({"text_config": {"dtype": "bfloat16"}})
    assert not names_a_dtype({"text_config": None, "dtype": None})


@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {"a": 1}}}],
)
def test_a_quantised_checkpoint_is_seen_wherever_it_says_so(tmp_path: Path, config: dict[str, Any]) -> None:
    write_config(tmp_path, {**LLAMA, **config})
    if not config:
        (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(CheckpointError, match="quantised"):
        compile_plan(tmp_path, tp_size=2)
