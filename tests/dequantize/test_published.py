"""Large quantised models with the names, dtypes and shapes of their published files, which hold nothing here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.sources.check_checkpoint import check_checkpoint
from tests.dequantize.test_values import DEEPSEEK, INT4, MXFP4
from tests.helpers.paths import PLANS
from tests.helpers.published import bf16_linear, deepseek_tensors, fp8_linear, gpt_oss_tensors, int4_linear
from tests.helpers.sparse import write_sparse_checkpoint


def config_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PLANS / name / "config.json").read_text())
    return {**config, "quantization_config": settings}


def deepseek() -> tuple[dict[str, Any], Any, int]:
    config = {**config_of("deepseek_v3", DEEPSEEK), "num_nextn_predict_layers": 1}
    return config, deepseek_tensors(config, fp8_linear, fp8_linear), 163


def kimi() -> tuple[dict[str, Any], Any, int]:
    config = {**config_of("kimi_k2", INT4), "model_type": "kimi_k2"}
    return config, deepseek_tensors(config, bf16_linear, int4_linear), 62


def gpt_oss() -> tuple[dict[str, Any], Any, int]:
    config = config_of("gpt_oss_120b", MXFP4)
    return config, gpt_oss_tensors(config), 14


MODELS: dict[str, Any] = {
    "deepseek_v3": (deepseek, 16, 91_991, 688_586),
    "kimi_k2": (kimi, 16, 208_215, 594_206),
    "gpt_oss_120b": (gpt_oss, 8, 687, 65_249),
}
"""TP size, tensors, and megabytes on disk."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss_120b", pytest.param("kimi_k2", marks=pytest.mark.slow)])
def test_a_published_model_is_planned_in_seconds_as_its_bf16_model(tmp_path: Path, name: str) -> None:
    make, tp_size, count, size = MODELS[name]
    config, tensors, num_files = make()
    assert len(tensors) == count
    assert write_sparse_checkpoint(tmp_path, config, tensors, num_files) // 1_000_000 in range(size - 20, size + 1)
    started = time.process_time()
    plan = compile_plan(tmp_path, tp_size=tp_size)
    assert time.process_time() - started < 5
    assert check_plan(plan) == []
    assert plan.dequantize is not None
    assert {entry.dtype for entry in plan.parameters} <= {"BF16", "F32"}
    golden = Plan.read(PLANS / name / f"tp{tp_size}.json")
    assert [(p.name, p.layout, p.style) for p in plan.parameters] == [
        (p.name, p.layout, p.style) for p in golden.parameters
    ]
    assert plan.layouts == golden.layouts
    assert check_checkpoint(plan, tmp_path) == []
