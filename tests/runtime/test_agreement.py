"""Ranks that are given different things, and one rank that fails: all are told, nothing is changed, nobody waits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

TP_SIZE = 2


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """The class and title of the error that `call` ends in."""
    from autotp_plan.schemas.errors import AutoTPError

    try:
        call()
    except AutoTPError as error:
        return type(error).__name__, error.faults[0].what
    return "no error", ""


def loading(work: Path) -> dict[str, tuple[str, str]]:
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan

    plan, other_plan = load_plan(work / "plan.json"), load_plan(work / "other-plan.json")
    found = {"before any group is made": refusal(lambda: plan.load_model(work / "nowhere"))}
    mine = dist.get_rank()
    found["one rank has no folder"] = refusal(lambda: plan.load_model(work / ("shards" if mine else "nowhere")))
    found["shards of other weights"] = refusal(lambda: plan.load_model(work / ("shards", "other-shards")[mine]))
    found["another checkpoint"] = refusal(lambda: plan.load_model(work / ("model", "other-model")[mine]))
    found["another plan"] = refusal(lambda: (plan, other_plan)[mine].load_model(work / "model"))
    found["shards and their checkpoint"] = refusal(lambda: plan.load_model(work / ("model", "shards")[mine]))
    return found


def saving(work: Path) -> dict[str, tuple[str, str]]:
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from tests.helpers.parity import engine_settings

    plan = load_plan(work / "plan.json")
    engine, *_ = plan.initialize(plan.load_model(work / "shards"), config=engine_settings(1))
    mine, jobs = dist.get_rank(), work / "jobs"
    found: dict[str, tuple[str, str]] = {}

    def save(folder: Path, tag: str) -> tuple[str, str]:
        return refusal(lambda: plan.save_checkpoint(engine, folder, tag))

    def load(folder: Path, tag: str | None = None) -> tuple[str, str]:
        return refusal(lambda: plan.load_checkpoint(engine, folder, tag))

    found["save first"], found["save second"] = save(jobs, "first"), save(jobs, "second")
    found["save, tags differ"] = save(jobs, ("a", "b")[mine])
    found["save, folders differ"] = save(work / ("new", "elsewhere")[mine], "a")
    found["save, client state that cannot be pickled on one rank"] = refusal(
        lambda: plan.save_checkpoint(engine, jobs, "c", {"mine": (lambda: 0) if mine else 0})
    )
    with _full_disk(engine, mine):
        found["save, disk full on one rank"] = save(jobs, "d")
    assert (jobs / "latest").read_text() == "second", "a save that failed was chosen"
    left = sorted(path.name for path in jobs.iterdir() if (path / "autotp_checkpoint.json").exists())
    assert left == ["first", "second"], left
    found["save again after it"] = save(jobs, "d")
    found["load, tags differ"] = load(jobs, ("first", "second")[mine])
    found["load, one rank has no folder"] = load((jobs, work / "nowhere")[mine])
    if mine == 0:
        shutil.copytree(jobs, work / "copied-jobs")
        (work / "copied-jobs" / "latest").write_text("first")
    dist.barrier()
    found["load, latest differs"] = load((jobs, work / "copied-jobs")[mine])
    found["save, latest differs"] = save((jobs, work / "copied-jobs")[mine], "e")
    found["load"] = load(jobs)
    return found


class _full_disk:
    """The engine's files cannot be written on TP rank 1."""

    def __init__(self, engine: Any, rank: int) -> None:
        self.writer, self.rank = engine.checkpoint_engine, rank

    def __enter__(self) -> None:
        def write(state_dict: Any, path: str) -> None:
            Path(path).write_bytes(b"a part")
            raise OSError(28, "No space left on device", path)

        if self.rank:
            self.writer.save = write

    def __exit__(self, *_: object) -> None:
        vars(self.writer).pop("save", None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.schemas.spec import SpecFile
    from tests.helpers.models import load_dense, save_checkpoint

    work = tmp_path_factory.mktemp("agreement")
    folder = save_checkpoint(work / "model", "llama")
    other = work / "other-model"
    model: Any = load_dense(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(other)
    plan = compile_plan(folder, tp_size=TP_SIZE)
    (work / "plan.json").write_text(plan.to_json())
    replicated = SpecFile.from_dict({"layer_specs": [{"patterns": [r"lm_head\.weight$"], "partition_type": "skip"}]})
    (work / "other-plan.json").write_text(compile_plan(folder, tp_size=TP_SIZE, specs=[replicated]).to_json())
    presplit(plan, folder, work / "shards")
    presplit(plan, other, work / "other-shards")
    return work


OTHER_MODELS = ("MismatchError", "the ranks would load parts of different models")
NO_CHECKPOINT = ("CheckpointError", "there is no safetensors checkpoint here")
OTHER_SAVES = ("MismatchError", "the ranks would not save one checkpoint")
OTHER_LOADS = ("MismatchError", "the ranks would not resume from one checkpoint")
NOT_WRITTEN = ("CheckpointError", "a file of the checkpoint could not be written")
FINE = ("no error", "")


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_ranks_load_parts_of_one_model_or_none(work: Path) -> None:
    expected = {
        "before any group is made": NO_CHECKPOINT,
        "one rank has no folder": NO_CHECKPOINT,
        "shards of other weights": OTHER_MODELS,
        "another checkpoint": OTHER_MODELS,
        "another plan": OTHER_MODELS,
        "shards and their checkpoint": FINE,
    }
    assert launch(loading, TP_SIZE, work) == [expected] * TP_SIZE


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_ranks_save_and_resume_one_checkpoint_or_none(work: Path) -> None:
    expected = {
        "save first": FINE,
        "save second": FINE,
        "save, tags differ": OTHER_SAVES,
        "save, folders differ": ("CheckpointError", OTHER_SAVES[1]),
        "save, client state that cannot be pickled on one rank": ("CheckpointError", "client_state cannot be saved"),
        "save, disk full on one rank": NOT_WRITTEN,
        "save again after it": FINE,
        "load, tags differ": OTHER_LOADS,
        "load, one rank has no folder": ("CheckpointError", "there is no complete checkpoint"),
        "load, latest differs": OTHER_LOADS,
        "save, latest differs": OTHER_SAVES,
        "load": FINE,
    }
    assert launch(saving, TP_SIZE, work) == [expected] * TP_SIZE
