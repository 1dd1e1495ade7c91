"""`generate` of a sharded model gives the tokens that the dense model gives, on every TP rank, whatever its seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "top-k": {"do_sample": True, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
    "without cache": {"do_sample": True, "use_cache": False},
    "several": {"do_sample": True, "num_return_sequences": 2},
}
NEW_TOKENS = 12


def tokens_of(model: Any, way: str, seed: int) -> list[list[int]]:
    import torch

    prompt = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(4))
    torch.manual_seed(seed)
    found: list[list[int]] = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        **WAYS[way],
    ).tolist()
    return found


def generated(plan_file: Path, folder: Path) -> dict[str, list[list[int]]]:
    """By way the tokens of this rank, whose seed is 100 times its DP rank, and its TP rank more."""
    from autotp_plan.runtime import load_plan

    plan = load_plan(plan_file)
    model = plan.load_model(folder).eval()
    seed = 100 * plan.ranks.dp_rank + plan.ranks.tp_rank
    found = {way: tokens_of(model, way, seed) for way in WAYS}
    unchecked = plan.load_model(folder, check_batches_every=None).eval()  # which would see that the ranks differ
    found["planted"] = tokens_of(_Unguarded(unchecked), "sampling", seed)
    return found


class _Unguarded:
    """A sharded model with the `generate` of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import GenerationMixin

        return GenerationMixin.generate(self.model, *args, **kwargs)


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_every_tp_rank_generates_the_dense_models_tokens(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import load_dense, save_checkpoint

    folder = save_checkpoint(tmp_path / "model", "llama")
    plan = compile_plan(folder, tp_size=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    ranks = launch(generated, 4, tmp_path / "plan.json", folder)
    dense = load_dense(folder).eval()
    for way in WAYS:
        expected = [tokens_of(dense, way, 100 * dp_rank) for dp_rank in range(2)]
        assert [rank[way] for rank in ranks] == [expected[0], expected[0], expected[1], expected[1]], way
        if WAYS[way].get("do_sample"):
            assert expected[0] != expected[1], f"{way}: two seeds give the same tokens"
    assert ranks[0]["planted"] != ranks[1]["planted"], "different seeds of TP ranks are not noticed by this test"
