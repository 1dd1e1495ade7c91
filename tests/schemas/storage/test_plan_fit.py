"""One check for checkpoints, shards and loading: what is missing, differs or is too many, folded over layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import SpecFile, check_checkpoint, compile_plan
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import read_checkpoint
from autotp_plan.schemas.storage.plan_fit import assembled_shape, checkpoint_faults, tensor_faults
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama", num_files=2)


@pytest.fixture
def plan(folder: Path) -> Plan:
    return compile_plan(folder, tp_size=2)


def faults(plan: Plan, folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    return {(fault.where, fault.what): (fault.got, fault.expected) for fault in check_checkpoint(plan, folder)}


def test_a_plan_fits_its_own_checkpoint(plan: Plan, folder: Path, tmp_path: Path) -> None:
    assert check_checkpoint(plan, folder) == []
    trivial: dict[str, Any] = {"torch_dtype": "float32", "transformers_version": "9", "_name_or_path": "x"}
    trivial["use_cache"] = False
    assert check_checkpoint(plan, write_llama(tmp_path / "again", **trivial)) == []


def test_missing_extra_and_changed_tensors_are_faults(plan: Plan, tmp_path: Path) -> None:
    shapes: dict[str, Any] = llama_shapes()
    for layer in range(2):
        del shapes[f"model.layers.{layer}.self_attn.k_proj.weight"]
        shapes[f"model.layers.{layer}.extra"] = (2,)
    shapes["model.norm.weight"] = (31,)
    dtype = {"lm_head.weight": "F32"}
    other = write_checkpoint(tmp_path / "other", shapes, LLAMA_CONFIG, dtype=dtype)
    assert faults(plan, other) == {
        ("model.layers.{0..1}.self_attn.k_proj.weight", "a tensor of the plan is missing"): (
            "",
            "BF16 of [16, 32]",
        ),
        ("model.layers.{0..1}.extra", "the checkpoint has a tensor that the plan does not know"): (
            "",
            "the plan's tensors only",
        ),
        ("model.norm.weight", "a tensor is not what the plan says"): ("BF16 of [31]", "BF16 of [32]"),
        ("lm_head.weight", "a tensor is not what the plan says"): ("F32 of [64, 32]", "BF16 of [64, 32]"),
    }


def test_another_config_is_a_fault(plan: Plan, folder: Path) -> None:
    what = "config.json is not the one the plan was compiled from"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    assert [name for _, name in faults(plan, folder)] == [what]
    (folder / "config.json").unlink()
    ((_, (got, _)),) = faults(plan, folder).items()
    assert got == "no config.json"


def test_old_tables_and_tied_heads_may_be_there(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {**llama_shapes(), "model.layers.1.self_attn.rotary_emb.inv_freq": (2,)}
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path / "old", shapes, config)
    assert check_checkpoint(compile_plan(folder, tp_size=2), folder) == []


def test_a_tied_head_may_be_there_under_its_other_name(tmp_path: Path) -> None:
    shapes = {"embed.weight": (4, 2), "embed_out.weight": (4, 2)}
    folder = write_checkpoint(tmp_path / "renamed", shapes, {}, tied={"embed_out.weight": "embed.weight"})
    spec = SpecFile.from_dict({
        "layer_specs": [{"patterns": [".*"], "partition_type": "skip"}],
        "renamed_tensors": {"embed_out.weight": "head.weight"}, "tied": [{"name": "head.weight", "to": "embed.weight"}],
    })  # fmt: skip
    plan = compile_plan(folder, tp_size=2, specs=[spec])
    assert plan.ignored == ("embed_out.weight",)
    assert check_checkpoint(plan, folder) == []


def test_faults_of_many_layers_are_one(plan: Plan, folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    tensors = dict(checkpoint.tensors)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        del tensors[prefix + "self_attn.q_proj.weight"]
        narrow = tensors[prefix + "mlp.up_proj.weight"]
        tensors[prefix + "mlp.up_proj.weight"] = replace(narrow, shape=(1, *narrow.shape[1:]))
        half = tensors[prefix + "mlp.down_proj.weight"]
        tensors[prefix + "mlp.down_proj.weight"] = replace(half, dtype="F64")
        tensors[prefix + "extra"] = replace(half, name="extra")
    found = {fault.where: fault.what for fault in checkpoint_faults(plan, replace(checkpoint, tensors=tensors))}
    assert found == {
        "model.layers.{0..1}.self_attn.q_proj.weight": "a tensor of the plan is missing",
        "model.layers.{0..1}.mlp.up_proj.weight": "a tensor is not what the plan says",
        "model.layers.{0..1}.mlp.down_proj.weight": "a tensor is not what the plan says",
        "model.layers.{0..1}.extra": "the checkpoint has a tensor that the plan does not know",
    }
    assert len(tensor_faults(plan, tensors)) == 3, "tensors that are too many do not hinder loading"


def test_shapes_that_make_up_a_parameter() -> None:
    assert assembled_shape([(4, 3)], 1, stacked=False) == (4, 3)
    assert assembled_shape([(4, 3), (2, 3)], 1, stacked=False) == (6, 3)
    assert assembled_shape([(4, 3), (4, 3)], 5, stacked=True) == (5, 8, 3)
    assert assembled_shape([()], 5, stacked=True) == (5,)
    assert assembled_shape([(4, 3), (4, 2)], 1, stacked=False) is None
    assert assembled_shape([(), ()], 1, stacked=False) is None
