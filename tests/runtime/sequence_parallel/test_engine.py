"""DeepSpeed's engine on a model whose stream is sharded along the sequence: the dense model's losses and norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

ZERO3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
OVERLAP: dict[str, Any] = {"autotp_size": 2, "tp_overlap_comm": True}
RUNS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "zero 0": (None, {"zero_stage": 0}),
    "zero 1": (None, {"zero_stage": 1, "accumulation": 2}),
    "zero 2": ("selective", {"zero_stage": 2, "accumulation": 2}),
    "zero 3": ("full", {"zero_stage": 3, "accumulation": 2, "zero_optimization": ZERO3}),
    "zero 1, overlap": ("selective", {"zero_stage": 1, "tensor_parallel": OVERLAP}),
    "zero 3, overlap": (None, {"zero_stage": 3, "zero_optimization": ZERO3, "tensor_parallel": OVERLAP}),
}
"""Activation checkpointing, and the engine's options."""


def in_ranks(work: Path, variants: tuple[str, ...]) -> dict[str, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    found: dict[str, Any] = {}
    for variant in variants:
        plan = load_plan(work / f"{variant}.json")
        for run, (kind, options) in RUNS.items():
            model = plan.load_model(work / variant, activation_checkpointing=kind).train()
            found[f"{variant}, {run}"] = parity.engine_steps(plan, model, **options)
    plan = load_plan(work / f"{variants[0]}.json")
    model = plan.load_model(work / variants[0], dtype=torch.bfloat16).train()
    found["bf16"] = parity.engine_steps(plan, model, 1, bf16={"enabled": True})
    return found


@pytest.mark.parametrize("variants", [("llama",), pytest.param(("gpt2", "deepseek_v3"), marks=pytest.mark.slow)])
def test_losses_and_norms_of_every_zero_stage_are_the_dense_models(tmp_path: Path, variants: tuple[str, ...]) -> None:
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.sequence_parallel import with_sequence_parallel
    from tests.helpers import parity
    from tests.helpers.models import load_dense, save_checkpoint

    expected = {}
    for variant in variants:
        folder = save_checkpoint(tmp_path / variant, variant)
        (tmp_path / f"{variant}.json").write_text(with_sequence_parallel(compile_plan(folder, tp_size=2)).to_json())
        for run, (_, options) in RUNS.items():
            dense = load_dense(folder, torch.float32)
            accumulation = options.get("accumulation", 1)
            expected[f"{variant}, {run}"] = parity.dense_steps(dense, dp_size=2, accumulation=accumulation)
    expected["bf16"] = expected[f"{variants[0]}, zero 0"]
    for found in launch(in_ranks, 4, tmp_path, variants):
        assert found.keys() == expected.keys()
        for run, steps in found.items():
            for one, other in zip(steps, expected[run], strict=True):
                assert one == pytest.approx(other, rel=0.03 if run == "bf16" else 1e-5), run
