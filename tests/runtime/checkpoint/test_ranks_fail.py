"""A rank that fails while it saves or resumes, by memory, disk or mistake: all are told, nobody waits."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.runtime.verify.workers import RankError
from tests.helpers.launch import launch
from tests.helpers.told import check_told
from tests.runtime.test_ranks_agree import planted_on, refusal


@contextlib.contextmanager
def _largest_file(size: int, here: bool) -> Iterator[None]:
    """On this rank, if it is `here`, no file gets larger: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _full(*_: Any, **__: Any) -> Any:
    raise MemoryError("2 GiB")


def in_two_ranks(work: Path) -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.checkpoint import job, plain_checkpoint, resume, save_shards
    from tests.helpers.parity import engine_settings

    me, jobs = dist.get_rank(), work / "jobs"
    plan = load_plan(work / "plan.json")
    model: Any = plan.load_model(work / "model").train()
    engine, *_ = plan.initialize(model, config=engine_settings(1))
    found: dict[str, str] = {}

    def save(tag: str, **more: Any) -> Callable[[], Any]:
        return lambda: plan.save_checkpoint(engine, jobs, tag, **more)

    found["save first"] = refusal(save("first"))
    with _largest_file(40_000, me == 1):
        found["save, disk full"] = refusal(save("full"))
        found["shards, disk full"] = refusal(lambda: plan.save_shards(engine, work / "new"))
    with _largest_file(40_000, me == 0):
        found["plain, disk full"] = refusal(lambda: model.save_pretrained(work / "plain"))
    found["save again"] = refusal(save("full"))
    found["shards again"] = refusal(lambda: plan.save_shards(engine, work / "new"))
    found["client state"] = refusal(save("lambda", client_state={"mine": (lambda: 0) if me else 0}))
    found["client state on both"] = refusal(save("lambda", client_state={"mine": lambda: 0}))
    planted: Any = (
        ("save, memory before", job, "about_engine", save("m1")),
        ("save, memory in the random state", job, "save_rng_state", save("m2")),
        ("shards, memory", save_shards, "element_copies", lambda: plan.save_shards(engine, work / "new2")),
        ("plain, memory", plain_checkpoint._Writer, "write", lambda: model.save_pretrained(work / "plain2")),
        ("load, memory before", resume, "file_faults", lambda: plan.load_checkpoint(engine, jobs)),
        ("load, memory in the random state", resume, "read_rng_state", lambda: plan.load_checkpoint(engine, jobs)),
        ("load, memory after", resume, "_set_position", lambda: plan.load_checkpoint(engine, jobs)),
    )
    for name, module, function, call in planted:
        found[name] = planted_on(0 if name == "plain, memory" else 1, module, function, _full, call)
    # a folder that is not shared, with what an earlier save left on the disk of each host
    mine = work / f"host{me}"
    (mine / "a").mkdir(parents=True)
    (mine / "a" / "autotp_unfinished").write_text("")
    found["not shared"] = refusal(lambda: plan.save_checkpoint(engine, mine, "a"))
    found["shards, not shared"] = refusal(lambda: plan.save_shards(engine, work / f"shards of host{me}"))
    engine.global_steps += me
    found["steps differ"] = refusal(save("steps"))
    engine.global_steps -= me
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = 70000.0
    found["at last"] = refusal(lambda: plan.load_checkpoint(engine, jobs, "first"))
    return found


EXPECTED = {
    "save first": ("no error",),
    "save, disk full": ("CheckpointError: a file of the checkpoint could not be written", "(rank 1)"),
    "shards, disk full": (
        "OutputError: the shards of a running job could not be written",
        "(rank 1)",
        "File too large",
    ),
    "plain, disk full": ("OutputError: the checkpoint could not be written", "(rank 0)", "File too large"),
    "save again": ("no error",),
    "shards again": ("no error",),
    "client state": ("CheckpointError: client_state cannot be saved", "(rank 1)"),
    "client state on both": ("CheckpointError: client_state cannot be saved",),
    "save, memory before": ("FailedRankError: the checkpoint could not be written", "(rank 1) | MemoryError: 2 GiB"),
    "save, memory in the random state": ("FailedRankError", "(rank 1) | MemoryError: 2 GiB"),
    "shards, memory": ("FailedRankError: the shards of a running job", "(rank 1) | MemoryError: 2 GiB"),
    "plain, memory": ("FailedRankError: the checkpoint could not be written", "(rank 0) | MemoryError: 2 GiB"),
    "load, memory before": ("FailedRankError: the checkpoint could not be read", "(rank 1) | MemoryError: 2 GiB"),
    "load, memory in the random state": ("FailedRankError", "(rank 1) | MemoryError: 2 GiB"),
    "load, memory after": ("FailedRankError", "(rank 1) | MemoryError: 2 GiB"),
    "not shared": ("CheckpointError: the ranks would not save one checkpoint", "(rank 1)"),
    "shards, not shared": ("OutputError: the ranks would not save one shards folder", "(rank 1)"),
    "steps differ": ("MismatchError: the ranks would not save one checkpoint", "step | rank 0: 0; rank 1: 1"),
    "at last": ("no error",),
}


def waits_in_a_collective() -> None:
    """Rank 1 fails in a call in which rank 0 waits for it, catches the error, and goes on."""
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime.deepspeed import attendance
    from autotp_plan.runtime.deepspeed.agreement import in_step

    attendance.SECONDS_AFTER_FAILURE = 1.0

    def work_of_all() -> None:
        if dist.get_rank():
            raise MemoryError("2 GiB")
        dist.all_reduce(torch.ones(1))

    in_step(work_of_all, "the engine could not be made")


def one_is_killed(work: Path) -> None:
    """Rank 1 ends without a word while it loads the model."""
    import os

    from autotp_plan.runtime import load_model, load_plan

    def end(*_: Any, **__: Any) -> None:
        os._exit(0)

    plan = load_plan(work / "plan.json")
    said = planted_on(1, load_model, "open_weights", end, lambda: plan.load_model(work / "model"))
    (work / "said of a killed one").write_text(said)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("fails")
    folder = save_checkpoint(work / "model", "llama")
    (work / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    return work


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_all_ranks_hear_of_one_that_fails(work: Path) -> None:
    check_told(launch(in_two_ranks, 2, work), EXPECTED)
    assert (work / "jobs" / "latest").read_text() == "full"


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_rank_that_waits_for_one_that_failed_ends() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit status 1") as raised:
        launch(waits_in_a_collective, 2, timeout=60)
    printed = str(raised.value.__cause__)
    assert "error: the engine could not be made: a rank failed that this one waits for\nrank 1: " in printed
    assert "MemoryError: 2 GiB" in printed


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_rank_that_was_killed_is_said_to_the_others(work: Path) -> None:
    with pytest.raises(RankError):
        launch(one_is_killed, 2, work, timeout=60)
    said = (work / "said of a killed one").read_text()
    assert said.startswith("FailedRankError: a rank has ended, or cannot be reached any more"), said
