"""More TP ranks than KV heads: several ranks hold a head, their gradients are summed, the norm counts it once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

CASES = {"two heads": ("llama", 2), "two heads and biases": ("qwen2", 2), "one head and head norms": ("qwen3", 1)}
MORE = ("phi3", "glm", "starcoder2", "cohere_qk_norm", "olmo2", "mixtral", "gpt_oss", "llama4_text")
"""Families with two KV heads on four ranks: fused, norms per head and over the whole width, experts, sinks."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from autotp_plan.planner import compile_plan
    from tests.helpers import parity
    from tests.helpers.models import eager_experts, load_dense, save_checkpoint

    work = tmp_path_factory.mktemp("kv")
    for name, (variant, num_kv_heads) in CASES.items():
        folder = save_checkpoint(work / name, variant, num_key_value_heads=num_kv_heads)
        for tp_size in (4, 8):
            (work / f"{name}.tp{tp_size}.json").write_text(compile_plan(folder, tp_size=tp_size).to_json())
        for attention in ("eager", "sdpa"):
            dense = load_dense(folder, torch.float64, attn_implementation=attention)
            torch.save(parity.gradients(dense), work / f"{name}.{attention}")
        (work / f"{name}.steps").write_text(json.dumps(parity.dense_steps(load_dense(folder), 1)))
    for variant in MORE:
        folder = save_checkpoint(work / variant, variant, num_key_value_heads=2)
        (work / f"{variant}.tp4.json").write_text(compile_plan(folder, tp_size=4).to_json())
        torch.save(
            parity.gradients(load_dense(folder, torch.float64, **eager_experts(torch.float64))), work / f"{variant}.f64"
        )
        (work / f"{variant}.steps").write_text(json.dumps(parity.dense_steps(load_dense(folder), 1)))
    return work


def in_ranks(work: Path, tp_size: int, stages: tuple[int, ...]) -> dict[str, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    found: dict[str, Any] = {}
    for variant in MORE if tp_size == 4 else ():
        file = work / f"{variant}.tp4.json"
        found[variant] = max(parity.compare_sharded(file, work / variant, work / f"{variant}.f64").values())
        plan = load_plan(file)
        found[f"{variant} zero1"] = parity.engine_steps(plan, plan.load_model(work / variant).train(), 1)
    for name in CASES:
        plan = load_plan(work / f"{name}.tp{tp_size}.json")
        for attention in ("eager", "sdpa"):
            model = plan.load_model(work / name, dtype=torch.float64, attn_implementation=attention).train()
            errors = parity.errors_against(torch.load(work / f"{name}.{attention}"), model, plan)
            found[f"{name} {attention}"] = max(errors.values())
        for stage in stages:
            found[f"{name} zero{stage}"] = parity.engine_steps(plan, plan.load_model(work / name).train(), stage)
    return found


def check(work: Path, found: dict[str, Any], stages: tuple[int, ...]) -> None:
    for name in CASES:
        for attention in ("eager", "sdpa"):
            assert found[f"{name} {attention}"] < 1e-9, f"{name} with {attention} attention"
        dense = json.loads((work / f"{name}.steps").read_text())
        for stage in stages:
            for ours, reference in zip(found[f"{name} zero{stage}"], dense, strict=True):
                assert ours == pytest.approx(reference, rel=1e-5), f"{name}, ZeRO {stage}"


def test_four_ranks_that_share_kv_heads_train_like_the_dense_model(work: Path) -> None:
    stages = (0, 1, 2, 3)
    found = launch(in_ranks, 4, work, 4, stages, timeout=400)[0]
    check(work, found, stages)
    for variant in MORE:
        assert found[variant] < 1e-9, variant
        dense = json.loads((work / f"{variant}.steps").read_text())
        for ours, reference in zip(found[f"{variant} zero1"], dense, strict=True):
            assert ours == pytest.approx(reference, rel=1e-5), variant


@pytest.mark.slow
def test_eight_ranks_that_share_kv_heads_train_like_the_dense_model(work: Path) -> None:
    """Two groups of four that share a head; on four ranks there are two groups of two, and one of four."""
    check(work, launch(in_ranks, 8, work, 8, (1,), timeout=400)[0], (1,))


def unsummed(work: Path) -> float:
    """Inside a rank: the largest error when the replicas' gradients are not summed."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.tensor_parallel import sharded_params
    from tests.helpers import parity

    sharded_params._sum_over_replicas = lambda gradient, **_: gradient
    plan = load_plan(work / "two heads.tp4.json")
    model = plan.load_model(work / "two heads", dtype=torch.float64).train()
    errors = parity.errors_against(torch.load(work / "two heads.sdpa"), model, plan)
    return max(error for name, error in errors.items() if "k_proj" in name or "v_proj" in name)


def test_gradients_not_summed_over_replicas_are_noticed(work: Path) -> None:
    assert launch(unsummed, 4, work, timeout=120)[0] > 1e-3
