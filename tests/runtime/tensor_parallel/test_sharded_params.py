"""What DeepSpeed asks of a sharded module: whole parameters and back, consolidated saving, maps for checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.layout import Layout, SubParameter
from tests.helpers.launch import launch


def layouts() -> dict[str, Layout]:
    sub = SubParameter
    return {
        "whole": Layout(shape=(5, 3)),
        "rows": Layout(shape=(8, 3), dim=0, sub_parameters=(sub(size=8, unit=1),), intervals=(((0, 4),), ((4, 8),))),
        "uneven columns": Layout(
            shape=(3, 7), dim=1, sub_parameters=(sub(size=7, unit=1),), intervals=(((0, 4),), ((4, 7),))
        ),
        "fused": Layout(
            shape=(8, 2),
            dim=0,
            sub_parameters=(sub(size=4, unit=2), sub(size=2, unit=1), sub(size=2, unit=1)),
            intervals=(((0, 2), (4, 5), (6, 7)), ((2, 4), (5, 6), (7, 8))),
        ),
        "partly shared": Layout(
            shape=(6, 2), dim=0, sub_parameters=(sub(size=6, unit=1),), intervals=(((0, 2), (4, 6)), ((2, 4), (4, 6)))
        ),
        "view": Layout(shape=(2, 4, 3), dim=1, sub_parameters=(sub(size=4, unit=1),), intervals=(((0, 2),), ((2, 4),))),
    }


@pytest.mark.parametrize("name", list(layouts()))
def test_affine_map_says_what_the_layout_says(name: str) -> None:
    import torch

    from autotp_plan.runtime.tensor_parallel.collectives import take
    from autotp_plan.runtime.tensor_parallel.sharded_params import affine_map

    layout = layouts()[name]
    whole = torch.arange(float(torch.Size(layout.shape).numel())).view(layout.shape)
    described = affine_map(layout, 2)
    described.validate_coverage()
    for rank in range(2):
        shard = whole if layout.dim is None else take(whole, layout.intervals[rank], layout.dim)
        assert torch.equal(described.extract(whole, rank).view(shard.shape), shard)
    shards = {rank: described.extract(whole, rank) for rank in range(2)}
    assert torch.equal(described.rebuild(shards).view(layout.shape), whole)


def gather_and_cut(plan_file: Path, shards: Path, original: Path, saved: Path) -> None:
    """Inside a rank: every replaced module's parameters put together equal the original's, and are cut again."""
    import torch
    from deepspeed.module_inject.layers import GatherReplacedLayerParams
    from safetensors.torch import load_file

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer
    from tests.helpers.parity import engine_settings

    plan = load_plan(plan_file)
    model = plan.load_model(shards)
    whole = load_file(original)
    seen = 0
    for name, module in model.named_modules():
        if not isinstance(module, PlannedLayer):
            continue
        parameters = dict(module.named_parameters(recurse=False))
        before = {leaf: parameter.data.clone() for leaf, parameter in parameters.items()}
        with GatherReplacedLayerParams(list(parameters.values()), module):
            for leaf, parameter in parameters.items():
                if f"{name}.{leaf}" in whole:
                    assert torch.equal(parameter.data, whole[f"{name}.{leaf}"]), f"{name}.{leaf}"
                    seen += 1
        for leaf, parameter in parameters.items():
            assert torch.equal(parameter.data, before[leaf])
    assert seen == 10
    for stage in (0, 3):
        model = plan.load_model(shards)
        settings = engine_settings(stage)
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        engine, *_ = plan.initialize(model, config=settings)
        if stage == 3:
            engine.save_16bit_model(str(saved), f"stage{stage}.bin")
        else:
            state: Any = engine._replace_module_consolidated_state_dict()
            if state is not None:
                torch.save(state, saved / f"stage{stage}.bin")
        engine.destroy()


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_deepspeed_consolidates_the_shards_to_the_full_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import load_dense, save_checkpoint

    checkpoint = save_checkpoint(tmp_path / "phi3", "phi3")
    plan = compile_plan(checkpoint, tp_size=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    presplit(plan, checkpoint, tmp_path / "shards")
    dense = {name: value.detach().clone() for name, value in load_dense(checkpoint).named_parameters()}
    save_file(dense, tmp_path / "whole.safetensors")
    launch(gather_and_cut, 2, tmp_path / "plan.json", tmp_path / "shards", tmp_path / "whole.safetensors", tmp_path)
    for stage in (0, 3):
        state = torch.load(tmp_path / f"stage{stage}.bin", weights_only=True)
        for name, value in load_file(tmp_path / "whole.safetensors").items():
            assert torch.equal(state[name].float(), value), f"ZeRO {stage}: {name}"
