"""Shards of a plan are those of the same plan with sequence parallelism, and of no other plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autotp_plan.planner import compile_plan, merge, presplit, reshard
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import MismatchError, OutputError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import ModuleAttribute, Repository
from autotp_plan.schemas.plan.without_stream import differ_in_stream_alone
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME, PLAN_NAME
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of

Both = dict[bool, Plan]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), biases=True)


@pytest.fixture(scope="module")
def plans(checkpoint: Path) -> Both:
    return {on: compile_plan(checkpoint, tp_size=2, sequence_parallel=on) for on in (False, True)}


@pytest.fixture(scope="module")
def shards(checkpoint: Path, plans: Both, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folders = {on: tmp_path_factory.mktemp("shards") / str(on) for on in plans}
    for on, folder in folders.items():
        presplit(plans[on], checkpoint, folder)
    return folders


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_either_reads_the_shards_of_the_other(
    shards: dict[bool, Path], plans: Both, written: bool, wanted: bool
) -> None:
    found, own = read_shards(shards[written], plans[wanted]), read_shards(shards[written])
    assert found.plan == plans[wanted]
    assert (found.tensors, found.unused, own.plan) == (own.tensors, own.unused, plans[written])
    found.verify()


def test_the_tensors_are_the_same_bytes(shards: dict[bool, Path], plans: Both, tmp_path: Path) -> None:
    """A header says which plan its file was written for; nothing else of a file depends on it."""
    names = {on: plans[on].fingerprint.encode() for on in plans}
    files = {
        on: {
            name: content.replace(names[on], b"the plan")
            for name, content in files_of(folder).items()
            if name not in (PLAN_NAME, MANIFEST_NAME)
        }
        for on, folder in shards.items()
    }
    assert files[False] == files[True]
    for on, folder in shards.items():
        merge(folder, tmp_path / str(on))
    assert files_of(tmp_path / "False") == files_of(tmp_path / "True")


HEADS = ModuleAttribute(module="model.layers.0.self_attn", attribute="num_heads", values=(1, 1))
OTHERS: dict[str, Callable[[Plan], Plan]] = {
    "another dtype": lambda plan: dataclasses.replace(
        plan, parameters=tuple(dataclasses.replace(one, dtype="F32") for one in plan.parameters)
    ),
    "another gradient": lambda plan: dataclasses.replace(
        plan, parameters=tuple(
            dataclasses.replace(one, partial_gradient=True) if "lm_head" in one.name else one for one in plan.parameters
        )
    ),
    "another config": lambda plan: dataclasses.replace(
        plan, model=dataclasses.replace(plan.model, config={**(plan.model.config or {}), "rope_theta": 1.0})
    ),
    "another attribute": lambda plan: dataclasses.replace(plan, module_attributes=(HEADS,)),
    "one parameter less": lambda plan: dataclasses.replace(plan, parameters=plan.parameters[1:]),
    "ignored tensors": lambda plan: dataclasses.replace(plan, ignored=("x",)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_that_differs_in_more_is_refused(shards: dict[bool, Path], plans: Both, name: str) -> None:
    change = OTHERS[name]
    for written in (False, True):
        other = change(plans[not written])
        assert other != plans[not written]
        assert not differ_in_stream_alone(other, plans[written])
        with pytest.raises(MismatchError, match="the shards are of another plan"):
            read_shards(shards[written], other)
        with pytest.raises(MismatchError, match="the shards are of another plan"):
            read_shards(shards[written], change(plans[written]))


def test_another_tp_size_is_refused(shards: dict[bool, Path], checkpoint: Path) -> None:
    four = compile_plan(checkpoint, tp_size=4, sequence_parallel=True)
    with pytest.raises(MismatchError, match="the shards are of another plan"):
        read_shards(shards[False], four)


def test_what_does_not_matter(plans: Both) -> None:
    """Notes, the rules, where the model came from, how entries are folded; and two different streams."""
    without, plan = plans[False], plans[True]
    repository = Repository(name="org/name", commit="a" * 40)
    other = dataclasses.replace(
        plan,
        notes=("a note",),
        rules=None,
        model=dataclasses.replace(plan.model, repository=repository),
        parameters=tuple(plan.expanded()),
    )
    assert differ_in_stream_alone(without, other) and differ_in_stream_alone(other, without)
    assert plan.sequence_parallel is not None
    whole = tuple(name.removesuffix(".down_proj") for name in plan.sequence_parallel.scatter)
    moved = dataclasses.replace(plan, sequence_parallel=dataclasses.replace(plan.sequence_parallel, scatter=whole))
    assert differ_in_stream_alone(plan, moved)
    assert not differ_in_stream_alone(plan, plan)
    assert not differ_in_stream_alone(without, without)


def test_a_folder_that_was_put_together_is_refused(shards: dict[bool, Path], plans: Both, tmp_path: Path) -> None:
    """The plan inside, the manifest and the files must still be of one plan."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, content in files_of(shards[False]).items():
        (folder / name).write_bytes(content)
    text = plans[True].to_json()
    (folder / PLAN_NAME).write_text(text)
    data = json.loads((folder / MANIFEST_NAME).read_text())
    for file in data["files"]:
        if file["name"] == PLAN_NAME:
            file["size"] = len(text)
    del data["fingerprint"]
    (folder / MANIFEST_NAME).write_text(documents.format_json({**data, "fingerprint": documents.fingerprint(data)}))
    for wanted in plans.values():
        with pytest.raises(MismatchError, match="the shards are of another plan"):
            read_shards(folder, wanted)


def test_a_finished_folder_is_not_taken_for_shards_that_the_other_plan_would_write(
    shards: dict[bool, Path], plans: Both, checkpoint: Path, tmp_path: Path
) -> None:
    """They can be read by it; but whoever asks for that plan in the folder is told that another one is there."""
    for on, plan in plans.items():
        before = files_of(shards[not on])
        with pytest.raises(OutputError, match="that is not empty"):
            presplit(plan, checkpoint, shards[not on])
        assert files_of(shards[not on]) == before
        reshard(shards[not on], tmp_path / str(on), plan=plan)
        assert files_of(tmp_path / str(on)) == files_of(shards[on])
