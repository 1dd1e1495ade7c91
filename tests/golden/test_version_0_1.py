"""What version 0.1 wrote is read, checked, resumed and written as before, byte for byte.

`version_0_1` is what `tests/golden/make.py` wrote with the code of that version, without the two scripts that DeepSpeed
puts beside a job.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import Plan, check_checkpoint, check_plan, check_shards, compile_plan, merge, presplit, reshard
from autotp_plan.schemas.jobs.job_lock import LOCK_NAME
from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME
from tests.golden.make import SETTINGS, steps, windows
from tests.helpers.launch import launch

OLD = Path(__file__).parent / "version_0_1"
TAG = "step2"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without the scripts that DeepSpeed puts beside a job."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("zero_to_")
    }


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_plans_are_compiled_to_the_same_bytes(tp_size: int) -> None:
    written = (OLD / f"tp{tp_size}.json").read_text()
    assert compile_plan(OLD / "checkpoint", tp_size=tp_size).to_json() == written
    plan = Plan.read(OLD / f"tp{tp_size}.json")
    assert plan.to_json() == written
    assert check_plan(plan) + check_checkpoint(plan, OLD / "checkpoint") == []


@pytest.mark.parametrize("folder", ["shards", "trained"])
def test_shards_are_sound(folder: str) -> None:
    assert check_shards(OLD / folder).plan.to_json() == (OLD / "tp2.json").read_text()


def test_presplit_writes_the_same_bytes(tmp_path: Path) -> None:
    presplit(Plan.read(OLD / "tp2.json"), OLD / "checkpoint", tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(OLD / "shards")


def test_merge_gives_the_checkpoint_back(tmp_path: Path) -> None:
    merge(OLD / "shards", tmp_path / "checkpoint")
    assert contents(tmp_path / "checkpoint") == contents(OLD / "checkpoint")


def test_reshard_writes_what_presplit_does(tmp_path: Path) -> None:
    reshard(OLD / "shards", tmp_path / "resharded", tp_size=4)
    presplit(Plan.read(OLD / "tp4.json"), OLD / "checkpoint", tmp_path / "shards")
    assert contents(tmp_path / "resharded") == contents(tmp_path / "shards")


def resume(work: Path) -> dict[str, Any]:
    """Resume the job on the mesh it was saved on; save it again at once, and train on."""
    from autotp_plan.runtime import load_plan

    plan = load_plan(work / "tp2.json")
    engine, _, loader, _ = plan.initialize(
        plan.load_model(work / "shards").train(), config=SETTINGS, training_data=windows()
    )
    state = plan.load_checkpoint(engine, work / "job")
    plan.save_checkpoint(engine, work / "again", client_state=state)
    plan.save_shards(engine, work / "trained_again")
    return {"state": state, "losses": steps(engine, loader)}


def resume_on_another_mesh(work: Path) -> list[float]:
    """Resume the job at TP=1 x DP=2; the mean loss of each step."""
    import torch

    from autotp_plan.runtime import load_plan

    plan = load_plan(work / "tp1.json")
    settings = {**SETTINGS, "train_micro_batch_size_per_gpu": 1}
    engine, _, loader, _ = plan.initialize(
        plan.load_model(work / "checkpoint").train(), config=settings, training_data=windows()
    )
    plan.load_checkpoint(engine, work / "job")
    found = torch.tensor(steps(engine, loader))
    torch.distributed.all_reduce(found)
    return (found / 2).tolist()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "work"
    shutil.copytree(OLD, folder)
    return folder


@pytest.fixture(scope="module")
def resumed(work: Path) -> list[dict[str, Any]]:
    return launch(resume, 2, work)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_job_is_resumed_with_the_losses_it_would_have_had(work: Path, resumed: list[dict[str, Any]]) -> None:
    expected = json.loads((work / "losses.json").read_text())["after"]
    for rank in resumed:
        assert rank["state"] == {"made_by": "tests.golden.make"}
        assert rank["losses"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_job_is_saved_as_before(work: Path, resumed: list[dict[str, Any]]) -> None:
    """With a lock, and a manifest that says the same and names every file."""
    assert resumed
    old, new = contents(OLD / "job"), contents(work / "again")
    assert new.keys() - old.keys() == {LOCK_NAME} and not old.keys() - new.keys()
    for name in old:
        if name.endswith(ABOUT_NAME):
            before, after = json.loads(old[name]), json.loads(new[name])
            added = {key: after.pop(key) for key in ("format", "version", "files", "fingerprint")}
            assert after == before and added["version"] == "1.0"
            folder = name.removesuffix(ABOUT_NAME)
            inside = {one.removeprefix(folder) for one in new if one.startswith(folder) and one != name}
            assert {file["name"] for file in added["files"]} == inside
        elif not name.endswith(".pt"):
            assert old[name] == new[name], name
        else:
            assert equal(loaded(OLD / "job" / name), loaded(work / "again" / name)) == [], name


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_running_job_writes_the_same_shards(work: Path, resumed: list[dict[str, Any]]) -> None:
    assert resumed
    assert contents(work / "trained_again") == contents(OLD / "trained")


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_job_is_resumed_on_another_mesh(work: Path) -> None:
    expected = json.loads((work / "losses.json").read_text())["after"]
    for found in launch(resume_on_another_mesh, 2, work):
        assert found == pytest.approx(expected, rel=1e-5)


def loaded(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=False)  # written by ourselves


def equal(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested values differ; tensors are compared to the last bit, versions and paths are not."""
    import torch

    if where.rpartition(".")[2] in ("ds_version", "ds_config"):
        return []
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{where}.{key}" for key in one.keys() ^ other.keys()]
        return missing + [
            found for key in one.keys() & other.keys() for found in equal(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [found for at, pair in enumerate(zip(one, other)) for found in equal(*pair, f"{where}.{at}")]
    simple = isinstance(one, (int, float, str, bytes, type(None)))
    return [where] if (one != other if simple else type(one) is not type(other)) else []


def test_a_difference_is_found() -> None:
    import torch

    value = {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}}
    assert equal(value, {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}}) == []
    other = {"a": [torch.ones(2), 2.0], "b": {"d": "x"}}
    assert sorted(equal(value, other)) == [".a.0", ".a.1", ".b.c", ".b.d"]
