"""Configs of public models of 2024 to 2026: each is planned, or refused in a true sentence; no traceback.

`real_configs.json` holds what a config.json says of the model's architecture, where that was read, and what becomes of
it without inference: `preset`, `tp_plan`, or the code of the fault. Of a quantised checkpoint it also holds what
becomes of the same model `unquantised`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotp_plan.planner import compile_plan
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.plan_table import summary
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.plan.document import Plan

CONFIGS: dict[str, Any] = json.loads((Path(__file__).parent / "real_configs.json").read_text(encoding="utf-8"))
PLANNED = ("preset", "tp_plan")
INFERRED = (
    "meta-llama/Llama-3.2-90B-Vision-Instruct",
    "LiquidAI/LFM2.5-VL-1.6B",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "nvidia/Nemotron-H-56B-Base-8K",
    "nvidia/Nemotron-H-8B-Base-8K",
    "ibm-granite/granite-4.0-h-small",
    "tiiuae/Falcon-H1-7B-Base",
    "zai-org/GLM-5",
    "zai-org/GLM-5.1",
    "zai-org/GLM-5.2",
)
"""Planned by rules that are inferred. Not planned are Qwen3-VL's experts, which lie transposed on disk, and Step-3.7,
whose checkpoint holds weights in pieces that are permuted.
"""
INFERRED_TYPES = {"deepseek_v32", "glm_moe_dsa", "nemotron_h"}
"""Of quantised checkpoints, the architectures without a preset that are planned by inferred rules: docs/families.md."""
TP_SIZE = 2


def right(plan: Plan) -> Any:
    """A proof that finds nothing wrong: `verify` and the tests of wrappers and families prove the architectures."""
    return SimpleNamespace(partial_gradients=(), problem=None)


def outcome(folder: Path) -> tuple[str, Plan | None, str]:
    try:
        plan = compile_plan(folder, tp_size=TP_SIZE, prove=right)
    except AutoTPError as error:
        codes = ", ".join(str(fault.code) for fault in error.faults)
        return codes, None, "; ".join(f"{fault.what}: {fault.got}" for fault in error.faults)
    return "tp_plan" if any("tp_plan" in note for note in plan.notes) else "preset", plan, ""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_planned_or_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    entry = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
    if entry.get("hf_quant_config"):
        (tmp_path / "hf_quant_config.json").write_text("{}")
    found, plan, sentence = outcome(tmp_path)
    assert found == entry["outcome"], sentence
    if plan is None:
        assert "Traceback" not in sentence and "\n" not in sentence, sentence
        return
    check(plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in CONFIGS.items() if "unquantised" in entry])
def test_the_architecture_of_a_quantised_checkpoint_is_planned_or_refused(tmp_path: Path, name: str) -> None:
    config = {"dtype": "bfloat16", **CONFIGS[name]["config"]}
    inner = {key: unquantised(value) for key, value in config.items() if isinstance(value, dict)}
    (tmp_path / "config.json").write_text(json.dumps(unquantised({**config, **inner})))
    found, plan, sentence = outcome(tmp_path)
    assert found == CONFIGS[name]["unquantised"], sentence
    if plan is not None:
        check(plan)


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def check(plan: Plan) -> None:
    assert check_plan(plan) == []
    totals = summary(plan)
    assert max(totals.per_rank) / totals.total < 0.65, "a small language model with a large tower is the most"
    assert {entry.dtype for entry in plan.parameters} <= {"BF16", "F16", "F32"}
    half = sum(e.dtype != "F32" for e in plan.parameters)
    assert half > len(plan.parameters) / 2, "every one of these is published in half precision"


def test_there_are_enough_of_them_and_most_are_planned() -> None:
    assert len(CONFIGS) >= 60
    assert all(entry["source"] for entry in CONFIGS.values())
    weights = [one for one in CONFIGS.values() if one["outcome"] not in ("quantised-weights", "unknown-model-type")]
    planned = [one for one in weights if one["outcome"] in PLANNED]
    assert len(planned) / len(weights) >= 0.7
    native = [one for one in weights if one["outcome"] != "remote-code"]
    assert (len(planned) + len(INFERRED)) / len(native) >= 0.9
    quantised = [one for one in CONFIGS.values() if one.get("unquantised", "remote-code") != "remote-code"]
    types = [one["config"]["model_type"] for one in quantised if one["unquantised"] == "no-preset"]
    planned += [one for one in quantised if one["unquantised"] in PLANNED]
    inferred = len(INFERRED) + sum(one in INFERRED_TYPES for one in types)
    assert (len(planned) + inferred) / (len(native) + len(quantised)) >= 0.9
    assert len({one["config"]["model_type"] for one in CONFIGS.values()}) >= 30


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [INFERRED[0], *(pytest.param(one, marks=pytest.mark.slow) for one in INFERRED[1:])])
def test_a_config_without_a_preset_is_inferred(tmp_path: Path, name: str) -> None:
    from autotp_plan.inference.infer import infer_rules

    assert CONFIGS[name]["outcome"] not in PLANNED
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]["config"]))
    plan = compile_plan(tmp_path, tp_size=TP_SIZE, infer=infer_rules, prove=right)
    totals = summary(plan)
    assert max(totals.per_rank) / totals.total < 0.75
