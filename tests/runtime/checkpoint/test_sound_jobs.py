"""What is named as the latest checkpoint is on disk, is what was saved, and holds nothing that is run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_plan.schemas.errors import AutoTPError, CheckpointError, OutputError
from autotp_plan.schemas.jobs.job_folder import checked_tag, latest, newest_sound, sealed, tags
from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME, LATEST_NAME
from autotp_plan.schemas.shards.folder import is_unfinished, read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from tests.helpers.launch import launch
from tests.schemas.jobs.test_job_lock import another_job

TAGS = ("first", "second")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("sound")
    folder = save_checkpoint(work / "model", "llama")
    (work / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    return work


def start(work: Path) -> tuple[Any, Any]:
    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    plan = load_plan(work / "plan.json")
    torch.manual_seed(11)
    engine, *_ = plan.initialize(plan.load_model(work / "model").train(), config=parity.engine_settings(1))
    return plan, engine


def step(engine: Any, seed: int) -> None:
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(seed))
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch " + os.environ["EVIL"],)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def hostile(tag: Path) -> None:
    """A pickle that runs code, with the checksums made right again."""
    path = next(tag.glob("*model_states.pt"))
    torch.save({"module": {}, "evil": Evil()}, path)
    (one,) = sealed(tag, [path], 0)
    data = json.loads((tag / ABOUT_NAME).read_text())
    data["files"] = [{**file, "size": one.size, "crc32": one.crc32} if file["name"] == one.name else file
                     for file in data["files"]]  # fmt: skip
    from autotp_plan.schemas import documents

    data["fingerprint"] = documents.fingerprint({key: value for key, value in data.items() if key != "fingerprint"})
    (tag / ABOUT_NAME).write_text(json.dumps(data))


ATTACKS: dict[str, Callable[[Path], object]] = {
    "flipped weights": lambda tag: flip(next(tag.glob("*model_states.pt"))),
    "flipped optimizer": lambda tag: flip(next(tag.glob("*optim_states.pt"))),
    "flipped random state": lambda tag: flip(tag / "random-1.safetensors"),
    "empty file": lambda tag: os.truncate(next(tag.glob("*optim_states.pt")), 0),
    "missing file": lambda tag: (tag / "random-0.safetensors").unlink(),
    "rank 1 of another step": lambda tag: shutil.copy(tag.parent / "first" / "mp_rank_01_model_states.pt", tag),
    "flipped manifest": lambda tag: flip(tag / ABOUT_NAME),
    "no manifest": lambda tag: (tag / ABOUT_NAME).unlink(),
    "empty latest": lambda tag: (tag.parent / LATEST_NAME).write_text(""),
    "code": hostile,
}


def attacked(work: Path) -> dict[str, tuple[str, str]]:
    """Inside a rank: what loading says after each attack, and that the engine is what it was."""
    from deepspeed import comm as dist

    from autotp_plan.runtime import load_plan  # noqa: F401 - imported before the environment is looked at

    os.environ["EVIL"] = str(work / "evil")
    plan, engine = start(work)
    job = work / "job"
    for seed, tag in enumerate(TAGS):
        step(engine, seed)
        plan.save_checkpoint(engine, job, tag, client_state={"seen": seed})
    weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
    found = {}
    for name, attack in ATTACKS.items():
        if dist.get_rank() == 0:
            shutil.copytree(job, work / name)
            attack(work / name / "second")
        dist.barrier()
        try:
            plan.load_checkpoint(engine, work / name)
            found[name] = ("loaded", "")
        except AutoTPError as error:
            found[name] = (error.faults[0].what, error.faults[0].next)
        assert all(torch.equal(one, now) for one, now in zip(weights, engine.module.parameters())), name
    assert not (work / "evil").exists()
    assert plan.load_checkpoint(engine, work / "flipped weights", "first") == {"seen": 0}
    assert plan.load_checkpoint(engine, job) == {"seen": 1}
    plan.load_checkpoint(engine, job, trust_checkpoint=True)
    refused_saves(plan, engine, job)
    plan.save_checkpoint(engine, work / "odd", "one", client_state={"a path": Path("a")})
    with pytest.raises(CheckpointError, match="holds more than data"):
        plan.load_checkpoint(engine, work / "odd")
    assert plan.load_checkpoint(engine, work / "odd", trust_checkpoint=True) == {"a path": Path("a")}
    plan.save_checkpoint(engine, job, "third", keep_last=2)
    assert sorted(tags(job)) == ["second", "third"], "the oldest is removed"
    with another_job(work / "taken") if dist.get_rank() == 0 else contextlib.nullcontext():
        dist.barrier()
        with pytest.raises(OutputError, match="another job writes to this folder"):
            plan.save_checkpoint(engine, work / "taken")
    plan.save_checkpoint(engine, work / "taken")  # its owner is dead
    return found


def refused_saves(plan: Any, engine: Any, job: Path) -> None:
    """Inside a rank: what cannot be saved is refused on all ranks before anything is written."""
    from deepspeed import comm as dist

    from autotp_plan.runtime.deepspeed.job_files import ENGINE_KEYS

    before = sorted(job.rglob("*"))
    for tag in (" lead", "trail\n", "a" * 300, "half \udc80", "two\nlines", "autotp_lock", "zero_to_fp32.py", "latest"):
        with pytest.raises(CheckpointError, match="a tag is not the name of a folder"):
            plan.save_checkpoint(engine, job, tag)
    on_one_rank: dict[Any, Any] = {"module": {}} if dist.get_rank() == 1 else {"fine": 1}
    states: list[dict[Any, Any]] = [{"f": lambda: 0}, {"module": {}}, {3: 0}, {"half \udc80": 0}, on_one_rank]
    for state in states:
        with pytest.raises(CheckpointError, match="client_state cannot be saved"):
            plan.save_checkpoint(engine, job, client_state=state)
    assert sorted(job.rglob("*")) == before
    saved = torch.load(next((job / "first").glob("*model_states.pt")), weights_only=False)
    assert saved.keys() - {"seen"} <= ENGINE_KEYS


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_no_changed_byte_is_resumed_and_the_newest_sound_checkpoint_is_named(work: Path) -> None:
    for found in launch(attacked, 2, work):
        assert found.keys() == ATTACKS.keys()
        for name, (what, next_step) in found.items():
            assert what != "loaded", name
            sound = "second" if name == "empty latest" else "first"
            assert f'tag="{sound}"' in next_step or name == "code", (name, what, next_step)
        assert found["code"][0] == "a file of the saved job holds more than data"
        assert "trust_checkpoint=True" in found["code"][1]


# power loss: a log of what is synced and renamed, from which the states are built that a disk may be in


@contextmanager
def logged(job: Path, log: Path) -> Iterator[None]:
    """While active, each sync and rename below the parent of `job` is logged, with what the names were at that time."""
    fsync, replace = os.fsync, os.replace
    parent = job.parent

    def note(kind: str, path: Path) -> None:
        if parent not in (path, *path.parents):
            return
        names = {}
        for one in parent.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another rank has just renamed it
                names[str(one.relative_to(parent))] = 0 if one.is_dir() else one.stat().st_ino
        event: dict[str, Any] = {"at": time.monotonic_ns(), "kind": kind, "names": names}
        event["path"] = str(path.relative_to(parent))
        if kind == "file":
            event["inode"], event["data"] = path.stat().st_ino, path.read_bytes().hex()
        with open(log, "a") as file:
            file.write(json.dumps(event) + "\n")

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        note("folder" if path.is_dir() else "file", path)

    def renamed(source: Any, target: Any, **options: Any) -> None:
        replace(source, target, **options)
        note("rename", Path(target))

    os.fsync, os.replace = synced, renamed  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync, os.replace = fsync, replace


def saved_with_a_log(work: Path, forget: str) -> None:
    """Inside a rank: two saves, their syncs logged. What is to be forgotten is not synced."""
    from deepspeed import comm as dist

    from autotp_plan.runtime.checkpoint import job as jobs

    plan, engine = start(work)
    folder = work / f"disk{forget}"
    job, log = folder / "job", work / f"log{forget}-{dist.get_rank()}"
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    if forget == "file":
        jobs.sealed = _without_sync  # type: ignore[attr-defined, assignment]
    if forget == "folder":
        jobs.sync_folder = lambda folder: None  # type: ignore[attr-defined]
    with logged(job, log):
        for seed, tag in enumerate(TAGS):
            step(engine, seed)
            plan.save_checkpoint(engine, job, tag)
            _note_return(log, tag)
        plan.save_shards(engine, folder / "shards")
        _note_return(log, "shards")


def _note_return(log: Path, what: str) -> None:
    from deepspeed import comm as dist

    dist.barrier()
    if dist.get_rank() == 0:
        with open(log, "a") as file:
            file.write(json.dumps({"at": time.monotonic_ns(), "kind": "returned", "path": what}) + "\n")


def _without_sync(tag: Path, paths: Any, rank: int) -> Any:
    sync, os.fsync = os.fsync, lambda descriptor: None  # type: ignore[assignment]
    try:
        return sealed(tag, paths, rank)
    finally:
        os.fsync = sync


def states(events: list[dict[str, Any]]) -> Iterator[tuple[list[str], dict[str, bytes | None]]]:
    """After each event, the saves that had returned, and two states that a disk may be in: path to bytes, or a folder.

    Of both, the bytes of a file are those of its last sync, none where there was none. Names are those of that moment;
    or, in each folder, those of its last sync.
    """
    data: dict[int, bytes] = {}
    returned: list[str] = []
    synced: dict[str, dict[str, int]] = {}
    names: dict[str, int] = {}
    for event in events:
        if event["kind"] == "returned":
            returned.append(event["path"])
        else:
            names = event["names"]
        if event["kind"] == "file":
            data[event["inode"]] = bytes.fromhex(event["data"])
        if event["kind"] == "folder":
            inside = {name: inode for name, inode in names.items() if str(Path(name).parent) == event["path"]}
            synced[event["path"]] = inside
        kept: dict[str, int] = {}
        waiting = ["."]
        while waiting:
            for name, inode in synced.get(waiting.pop(), {}).items():
                kept[name] = inode
                waiting.append(name)
        for listing in (names, kept):
            yield list(returned), {name: data.get(inode, b"") if inode else None for name, inode in listing.items()}


def unsound(work: Path, forget: str) -> list[str]:
    """The states after a power loss from which a job that had saved cannot go on, or goes on from something else."""
    events = [json.loads(line) for path in work.glob(f"log{forget}-*") for line in path.read_text().splitlines()]
    events.sort(key=lambda event: event["at"])
    wrong = []
    for number, (returned, state) in enumerate(states(events)):
        disk = work / "after"
        shutil.rmtree(disk, ignore_errors=True)
        for name, data in sorted(state.items(), key=lambda item: len(Path(item[0]).parts)):
            path = disk / name
            if data is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        wrong += [f"{number}: shards: {error}" for error in shards_errors(disk / "shards", "shards" in returned)]
        returned = [tag for tag in returned if tag in TAGS]
        job = disk / "job"
        try:
            named = latest(job)
        except AutoTPError as error:
            wrong.append(f"{number}: {error}")
            continue
        if named is not None and checked_tag(job, named).faults:
            wrong.append(f"{number}: latest names {named}: {checked_tag(job, named).faults[0]}")
        if returned and (named not in TAGS or TAGS.index(named) < TAGS.index(returned[-1])):
            wrong.append(f"{number}: {returned[-1]} was saved, and latest is {named}")
        if returned and newest_sound(job) is None:
            wrong.append(f"{number}: {tags(job)} are not sound")
    assert len(events) > 20
    return wrong


def shards_errors(shards: Path, returned: bool) -> Iterator[str]:
    """What is wrong with shards that are taken for finished, or should be there."""
    if not is_unfinished(shards) and (shards / MANIFEST_NAME).exists():
        try:
            read_shards(shards).verify()
        except AutoTPError as error:
            yield str(error)
    elif returned:
        yield "save_shards had returned"


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_after_a_power_loss_at_any_moment_the_latest_checkpoint_is_sound(work: Path) -> None:
    launch(saved_with_a_log, 2, work, "")
    assert unsound(work, "") == []


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(270)
@pytest.mark.parametrize("forget", ["file", "folder"])
def test_a_sync_that_is_forgotten_is_found(work: Path, forget: str) -> None:
    launch(saved_with_a_log, 2, work, forget)
    assert unsound(work, forget)
