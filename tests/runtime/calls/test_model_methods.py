"""Counting the parameters of a sharded model: of fused weights that ranks share in part, of experts, under ZeRO 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.helpers.models import load_dense, save_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {"phi3": {"num_key_value_heads": 2}, "mixtral": {}, "llama_bias_tied": {}}


def counts(model: Any) -> list[int]:
    """All parameters, those that are not of embeddings, and those that train when a part is frozen."""
    found = [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]
    model.model.layers[0].requires_grad_(False)
    return [*found, model.num_parameters(only_trainable=True)]


def sharded_counts(work: Path) -> dict[str, Any]:
    from transformers import PreTrainedModel

    from autotp_plan.runtime import load_plan
    from tests.helpers.parity import engine_settings

    found: dict[str, Any] = {}
    for variant in VARIANTS:
        plan = load_plan(work / f"{variant}.json")
        found[variant] = counts(plan.load_model(work / variant))
        model: Any = plan.load_model(work / variant)
        found["planted"] = PreTrainedModel.num_parameters(model)
        engine, *_ = plan.initialize(model, config=engine_settings(3))
        found[f"{variant}, ZeRO 3"] = counts(engine.module)
        engine.destroy()
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_the_parameters_of_the_model_are_counted(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan

    for variant, changes in VARIANTS.items():
        save_checkpoint(tmp_path / variant, variant, **changes)
        (tmp_path / f"{variant}.json").write_text(compile_plan(tmp_path / variant, tp_size=4).to_json())
    expected = {variant: counts(load_dense(tmp_path / variant)) for variant in VARIANTS}
    for found in launch(sharded_counts, 4, tmp_path):
        for variant in VARIANTS:
            assert found[variant] == expected[variant] == found[f"{variant}, ZeRO 3"], variant
        assert found["planted"] < expected["llama_bias_tied"][0], "transformers' own counts a rank's"
