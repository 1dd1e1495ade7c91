"""`local_shard` gives what the plan says a rank holds, however the model holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch

FUSED = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("local shard")
    folder = save_checkpoint(work / "phi3", "phi3", num_key_value_heads=2, num_hidden_layers=1)
    (work / "plan.json").write_text(compile_plan(folder, tp_size=4).to_json())
    return work


def error_of(model: Any, name: str, **options: Any) -> str:
    from autotp_plan.runtime import local_shard

    try:
        local_shard(model, name, **options)
    except MismatchError as error:
        return str(error)
    return "nothing was said"


def in_four_ranks(work: Path) -> dict[str, Any]:
    import torch
    from deepspeed.runtime.zero import GatheredParameters

    from autotp_plan.runtime import load_plan, local_shard
    from autotp_plan.runtime.tensor_parallel.collectives import take
    from tests.helpers.models import batch, load_dense
    from tests.helpers.parity import engine_settings

    plan = load_plan(work / "plan.json")
    model = plan.load_model(work / "phi3").train()
    model(input_ids=batch(0), labels=batch(0), use_cache=False).loss.backward()
    full = dict(load_dense(work / "phi3").named_parameters())
    found: dict[str, Any] = {"held in": [name for name, _ in model.named_parameters() if name.startswith(FUSED)]}
    wrong = []
    for parameter in plan.document.expanded():
        layout, name = plan.document.layouts[parameter.layout], parameter.name
        shard = full[name].detach()
        if layout.dim is not None:
            shard = take(shard.view(layout.shape), layout.intervals[plan.ranks.tp_rank], layout.dim)
        held, gradient = local_shard(model, name), local_shard(model, name, gradient=True)
        assert held is not None and gradient is not None
        if held.shape != shard.shape or not torch.equal(held, shard) or gradient.shape != held.shape:
            wrong.append(name)
    found["wrong"] = wrong
    found["unknown"] = error_of(model, FUSED.replace("qkv_proj", "qkv_porj"))
    found["half"] = error_of(model, FUSED + "_shared")
    found["nothing"] = error_of(model, "")
    model.zero_grad()

    for stage in (1, 3):
        engine, *_ = plan.initialize(model, config=engine_settings(stage))
        if stage == 3:
            found["partitioned"] = error_of(engine, FUSED)
            with GatheredParameters(list(engine.module.parameters())):
                held = local_shard(engine, FUSED)
                found["gathered"] = held is not None and held.shape == shard_shape(plan)
        else:
            held = local_shard(engine, FUSED)
            found["engine"] = held is not None and torch.equal(held, local_shard(model, FUSED))  # type: ignore[arg-type]
            found["no gradient"] = local_shard(engine, FUSED, gradient=True)
        engine.destroy()
        model = plan.load_model(work / "phi3").train()
    return found


def shard_shape(plan: Any) -> tuple[int, ...]:
    parameter = next(one for one in plan.document.expanded() if one.name == FUSED)
    shape: tuple[int, ...] = plan.document.layouts[parameter.layout].rank_shape(plan.ranks.tp_rank)
    return shape


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_what_a_rank_holds_of_each_parameter(work: Path) -> None:
    for found in launch(in_four_ranks, 4, work, timeout=200):
        assert found["held in"] == [FUSED, FUSED + "_shared"], "two KV heads on four ranks"
        assert not found["wrong"]
        assert "the model has no such parameter" in found["unknown"] and f'did you mean "{FUSED}"?' in found["unknown"]
        assert f'did you mean "{FUSED}"?' in found["half"], "a plan has no such name"
        assert "the model has no such parameter" in found["nothing"]
        assert found["engine"] and found["gathered"]
        assert found["no gradient"] is None, "ZeRO takes gradients away"
        assert "ZeRO 3 has partitioned the shard" in found["partitioned"]
        assert "GatheredParameters" in found["partitioned"], "and what is proposed works"
