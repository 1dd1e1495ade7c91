"""One check for checkpoints, shards and loading: what is missing, differs or is too many, folded over layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autotp_plan.planner import check_checkpoint, compile_plan
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import Checkpoint, read_checkpoint
from autotp_plan.schemas.storage.plan_fit import assembled_shape, checkpoint_faults, tensor_faults
from tests.helpers.checkpoints import write_llama


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Plan, Checkpoint]:
    folder = write_llama(tmp_path / "llama")
    return compile_plan(folder, tp_size=2), read_checkpoint(folder)


def test_the_checkpoint_of_a_plan_fits(llama: tuple[Plan, Checkpoint]) -> None:
    plan, checkpoint = llama
    assert checkpoint_faults(plan, checkpoint) == check_checkpoint(plan, checkpoint.folder) == []


def test_faults_of_many_layers_are_one(llama: tuple[Plan, Checkpoint]) -> None:
    plan, checkpoint = llama
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
