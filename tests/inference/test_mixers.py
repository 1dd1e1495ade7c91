"""Mixers that are not attention: sharded by heads, channels or groups, with the counts that their modules hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.inference.infer import infer_rules, infer_spec
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.mixers import mixer_folder
from tests.inference.test_infer import inferred

pytestmark = pytest.mark.filterwarnings("ignore")
SLOW = pytest.mark.slow


def attributes_of(plan: Plan, module: str) -> dict[str, int]:
    """The values on rank 1 of a module's attributes."""
    return {one.attribute: one.values[1] for one in plan.module_attributes if one.module == module}


def shards_of(plan: Plan, module: str) -> dict[str, list[tuple[int, int]]]:
    """The intervals that rank 1 holds of the sharded parameters in a module."""
    found = {}
    for entry in plan.expanded():
        layout = plan.layouts[entry.layout]
        if entry.name.startswith(f"{module}.") and layout.dim is not None:
            found[entry.name.removeprefix(f"{module}.")] = list(layout.intervals[1])
    return found


def test_one_group_of_a_state_space_mixer_is_on_every_rank(tmp_path: Path) -> None:
    """Bamba: z, x and dt by heads, B and C (rows 256 to 287) replicated, the norm's mean over the ranks."""
    plan = inferred(mixer_folder(tmp_path, "bamba"), 2, infer_rules(tmp_path))
    assert shards_of(plan, "model.layers.0.mamba") == {
        "in_proj.weight": [(64, 128), (192, 288), (292, 296)],
        "conv1d.weight": [(64, 160)],
        "conv1d.bias": [(64, 160)],
        "A_log": [(4, 8)],
        "D": [(4, 8)],
        "dt_bias": [(4, 8)],
        "norm.weight": [(64, 128)],
        "out_proj.weight": [(64, 128)],
    }
    assert attributes_of(plan, "model.layers.0.mamba") == {"num_heads": 4, "intermediate_size": 64, "conv_dim": 96}
    assert attributes_of(plan, "model.layers.0.mamba.norm") == {"group_size": 64}
    assert [one.module for one in plan.modules if one.mean_over_ranks] == ["model.layers.0.mamba.norm"]


def test_groups_of_a_state_space_mixer_are_sharded(tmp_path: Path) -> None:
    """Mamba 2: each rank has two of four groups, and norms of its own heads."""
    plan = inferred(mixer_folder(tmp_path, "mamba2"), 2, infer_rules(tmp_path))
    found = shards_of(plan, "backbone.layers.1.mixer")
    assert found["in_proj.weight"] == [(64, 128), (192, 256), (288, 320), (352, 384), (388, 392)]
    assert found["conv1d.weight"] == [(64, 128), (160, 192), (224, 256)]
    expected = {"num_heads": 4, "intermediate_size": 64, "n_groups": 2, "conv_dim": 128}
    assert attributes_of(plan, "backbone.layers.{0..1}.mixer") == expected
    assert not plan.modules


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("falcon_mamba", "backbone.layers.0.mixer"), pytest.param("jamba", "model.layers.0.mamba", marks=SLOW)],
)
def test_a_mixer_with_a_row_parallel_layer_inside(tmp_path: Path, model_type: str, module: str) -> None:
    """Mamba 1: channels are sharded; what `x_proj` makes of all of them is summed, and its gradient too."""
    plan = inferred(mixer_folder(tmp_path, model_type), 2, infer_rules(tmp_path))
    assert shards_of(plan, module) == {
        "in_proj.weight": [(64, 128), (192, 256)],
        **{name: [(64, 128)] for name in ("conv1d.weight", "conv1d.bias", "x_proj.weight", "out_proj.weight")},
        **{name: [(64, 128)] for name in ("dt_proj.weight", "dt_proj.bias", "A_log", "D")},
    }
    styles = {entry.name.removeprefix(f"{module}."): entry.style for entry in plan.expanded()}
    assert (styles["x_proj.weight"], styles["dt_proj.weight"]) == ("row", "shard"), "the code reads dt_proj.weight"
    (crossing,) = (one for one in plan.modules if one.module.endswith("x_proj"))
    assert crossing.output is not None and crossing.output.operation == "copy"
    partial = {entry.name.rpartition(f"{module}.")[2] for entry in plan.expanded() if entry.partial_gradient}
    norms = {f"{part}_layernorm.weight" for part in ("dt", "b", "c")} if model_type == "jamba" else set()
    assert partial == norms


def test_a_buffer_that_scales_a_fused_projection_follows_it(tmp_path: Path) -> None:
    spec = infer_spec(mixer_folder(tmp_path, "falcon_h1"))
    (module,) = (one for one in spec["modules"] if "buffers" in one)
    assert module["buffers"] == {"mup_vector": "in_proj.weight"}
    assert any(one.buffers for one in SpecFile.from_dict(spec).modules)


@SLOW
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_a_gated_delta_net_is_sharded_by_heads_of_keys(tmp_path: Path, model_type: str) -> None:
    plan = inferred(mixer_folder(tmp_path, model_type), 2, infer_rules(tmp_path))
    module = "model.layers.0.linear_attn"
    found = shards_of(plan, module)
    assert found["conv1d.weight"] == [(16, 32), (48, 64), (112, 160)]
    assert found["A_log"] == found["dt_bias"] == [(4, 8)]
    assert found["out_proj.weight"] == [(48, 96)]
    if model_type == "qwen3_next":  # for each head of keys q, k, and v and z of two heads of values
        assert found["in_proj_qkvz.weight"] == [(128, 256)] and found["in_proj_ba.weight"] == [(8, 16)]
    else:
        assert found["in_proj_qkv.weight"] == found["conv1d.weight"] and found["in_proj_z.weight"] == [(48, 96)]
    expected = {"num_k_heads": 2, "num_v_heads": 4, "key_dim": 16, "value_dim": 48, "conv_dim": 80}
    assert attributes_of(plan, module) == expected
    partial = {entry.name for entry in plan.expanded() if entry.partial_gradient}
    assert f"{module}.norm.weight" in partial


@pytest.mark.parametrize(
    ("model_type", "whole"),
    [("lfm2", []), ("minicpm3", ["kv_a_proj_with_mqa", "q_a_proj"]), pytest.param("nemotron_h", ["gate"], marks=SLOW)],
)
def test_what_stays_whole_in_layers(tmp_path: Path, model_type: str, whole: list[str]) -> None:
    """Short convolutions, latent attention, and a hybrid whose mixers all have one name."""
    rules = infer_rules(mixer_folder(tmp_path, model_type))
    for tp_size in (2, 4):
        plan = inferred(tmp_path, tp_size, rules)
        found: set[Any] = set()
        for entry in plan.expanded():
            shape = plan.shape_of(entry)
            if len(shape) > 1 and plan.layouts[entry.layout].dim is None:
                found.add(entry.name.split(".")[-2])
        assert sorted(found) == whole
