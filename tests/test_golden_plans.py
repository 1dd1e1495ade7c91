"""The files in `plans/`: what compiling gives today, and what the real checkpoints hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import Plan, check_checkpoint, check_plan, compile_plan
from tests.helpers.sparse import Tensors, llama_tensors, neox_tensors, write_sparse_checkpoint

PLANS = Path(__file__).parent.parent / "plans"
FILES = sorted(PLANS.glob("*/tp*.json"))
MODELS = {  # the checkpoints' tensors, number of files and of parameters, as on the hub
    "llama_3_1_8b": (llama_tensors, 4, 8_030_261_248),
    "pythia_6_9b": (neox_tensors, 2, 6_857_302_016),
}

every_plan = pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")


def config_and_tensors(model: str) -> tuple[dict[str, Any], Tensors]:
    config = json.loads((PLANS / model / "config.json").read_text())
    return config, MODELS[model][0](config)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint of one of the models, in a folder of the model's name."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    folder.mkdir()
    write_sparse_checkpoint(folder, *config_and_tensors(request.param), num_files=MODELS[request.param][1])
    return folder


def test_there_are_plans_of_every_model() -> None:
    assert {file.parent.name for file in FILES} == MODELS.keys()
    assert [file.name for file in FILES] == ["tp2.json", "tp4.json", "tp8.json", "tp4.json"]


@every_plan
def test_compiling_the_config_again_gives_the_same_bytes(file: Path) -> None:
    plan = compile_plan(file.parent, tp_size=int(file.stem.removeprefix("tp")))
    assert plan.to_json().encode() == file.read_bytes()


@every_plan
def test_nothing_is_wrong_with_a_plan(file: Path) -> None:
    plan = Plan.read(file)
    assert check_plan(plan) == []
    assert plan.to_json().encode() == file.read_bytes()
    assert plan.notes == ()


def test_the_checkpoint_compiles_to_the_bytes_that_its_config_compiles_to(checkpoint: Path) -> None:
    for file in (PLANS / checkpoint.name).glob("tp*.json"):
        plan = compile_plan(checkpoint, tp_size=int(file.stem.removeprefix("tp")))
        assert plan.to_json().encode() == file.read_bytes()


def test_plans_fit_the_names_on_disk(checkpoint: Path) -> None:
    for file in (PLANS / checkpoint.name).glob("tp*.json"):
        assert check_checkpoint(Plan.read(file), checkpoint) == []


def test_a_plan_does_not_fit_a_checkpoint_that_lacks_its_head(tmp_path: Path) -> None:
    config, tensors = config_and_tensors("pythia_6_9b")
    renamed = {name.replace("embed_out", "head"): entry for name, entry in tensors.items()}
    write_sparse_checkpoint(tmp_path, config, renamed, num_files=2)
    found = [
        (fault.what, fault.where) for fault in check_checkpoint(Plan.read(PLANS / "pythia_6_9b/tp4.json"), tmp_path)
    ]
    assert found == [
        ("the checkpoint lacks a tensor of the plan", "embed_out.weight"),
        ("the checkpoint has a tensor that the plan does not know", "head.weight"),
    ]


@every_plan
def test_a_plan_holds_every_parameter_of_the_model_once(file: Path) -> None:
    plan = Plan.read(file)
    _, tensors = config_and_tensors(file.parent.name)
    planned = {entry.source or entry.name: (entry.dtype, plan.shape_of(entry)) for entry in plan.expanded()}
    tables = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    assert planned == {name: entry for name, entry in tensors.items() if not name.endswith(tables)}
    assert sum(math.prod(shape) for _, shape in planned.values()) == MODELS[file.parent.name][2]
