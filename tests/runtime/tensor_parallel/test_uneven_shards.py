"""Head counts and widths that the TP size does not divide: whole KV groups to each rank, by a flag or by rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

GROUP = "head_dim * num_heads // num_kv_heads"
UNEVEN = {
    "layer_specs": [
        {"patterns": [r".*\.q_proj\.weight$"], "unit": GROUP, "indivisible": "uneven"},
        {"patterns": [r".*\.[kv]_proj\.weight$"], "unit": "head_dim", "indivisible": "uneven"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row", "unit": GROUP, "indivisible": "uneven"},
        {"patterns": [r".*\.(gate|up)_proj\.weight$"], "indivisible": "uneven"},
        {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row", "indivisible": "uneven"},
    ]
}


def in_ranks(work: Path) -> dict[str, Any]:
    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    found: dict[str, Any] = {}
    for folder in ("shards", "checkpoint"):
        found[folder] = max(parity.compare_sharded(work / "plan.json", work / folder, work / "dense").values())
    plan = load_plan(work / "plan.json")
    for stage in (0, 3):
        found[f"zero{stage}"] = parity.engine_steps(plan, plan.load_model(work / "shards").train(), stage)
    return found


def test_uneven_shards_by_a_spec_file_train_like_the_dense_model(tmp_path: Path) -> None:
    import torch

    from autotp_plan.planner import SpecFile, compile_plan, presplit
    from autotp_plan.planner.plan_table import as_json
    from tests.helpers import parity
    from tests.helpers.models import load_dense, save_checkpoint

    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama_bias_tied", intermediate_size=100, vocab_size=257)
    plan = compile_plan(checkpoint, tp_size=3, specs=[SpecFile.from_dict(UNEVEN)])
    by_name = {entry["name"]: entry["intervals"] for entry in as_json(plan)["parameters"]}
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == [[[0, 32]], [[32, 48]], [[48, 64]]], "2, 1 and 1 groups"
    assert by_name["model.layers.0.self_attn.k_proj.weight"] == [[[0, 16]], [[16, 24]], [[24, 32]]]
    assert by_name["model.layers.0.mlp.up_proj.bias"] == [[[0, 34]], [[34, 67]], [[67, 100]]]
    (tmp_path / "plan.json").write_text(plan.to_json())
    presplit(plan, checkpoint, tmp_path / "shards")
    torch.save(parity.gradients(load_dense(checkpoint, torch.float64)), tmp_path / "dense")
    dense = parity.dense_steps(load_dense(checkpoint), 1)
    found = launch(in_ranks, 3, tmp_path, timeout=200)[0]
    assert found["shards"] < 1e-9 and found["checkpoint"] < 1e-9
    for stage in (0, 3):
        for ours, reference in zip(found[f"zero{stage}"], dense, strict=True):
            assert ours == pytest.approx(reference, rel=1e-5)


ON_THREE = (
    "llama", "phi3", "gemma2", "gpt_neox", "bloom", "falcon_multi_query", "falcon_grouped", "falcon_alibi", "gpt2",
    "gpt_bigcode_multi_query", "opt", "mpt", "dbrx", "olmo2", "cohere_qk_norm", "mixtral", "gpt_oss", "deepseek_v2",
)  # fmt: skip
ON_SIX: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8}, "gpt_neox": {}, "bloom": {}, "mixtral": {"num_key_value_heads": 8},
}  # fmt: skip


def flagged(work: Path, variants: tuple[str, ...]) -> dict[str, float]:
    """Inside a rank: the largest error of each."""
    from tests.helpers import parity

    return {
        variant: max(
            parity.compare_sharded(work / f"{variant}.json", work / variant, work / f"{variant}.dense").values()
        )
        for variant in variants
    }


@pytest.mark.parametrize("tp_size", [3, 6])
def test_uneven_shards_by_the_flag_have_the_dense_models_gradients(tmp_path: Path, tp_size: int) -> None:
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.schemas.errors import CompileError
    from tests.helpers import parity
    from tests.helpers.models import eager_experts, load_dense, save_checkpoint

    variants = ON_THREE if tp_size == 3 else tuple(ON_SIX)
    for variant in variants:
        folder = save_checkpoint(tmp_path / variant, variant, **(ON_SIX[variant] if tp_size == 6 else {}))
        with pytest.raises(CompileError, match="--uneven"):
            compile_plan(folder, tp_size=tp_size)
        (tmp_path / f"{variant}.json").write_text(compile_plan(folder, tp_size=tp_size, uneven=True).to_json())
        dense = load_dense(folder, torch.float64, **eager_experts(torch.float64))
        torch.save(parity.gradients(dense), tmp_path / f"{variant}.dense")
    for found in launch(flagged, tp_size, tmp_path, variants, timeout=250):
        assert all(error < 1e-9 for error in found.values()), found
