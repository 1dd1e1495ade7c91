"""The quick part of `benchmarks.job_faults`: each kind of fault once; and that it finds what is planted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from benchmarks.job_faults import disk
from benchmarks.job_faults.campaign import TWO_JOBS, run
from benchmarks.job_faults.planted import PLANTED
from benchmarks.job_faults.ranks import Server
from benchmarks.job_faults.trials import TRIALS

FOUND_BY = {
    "no sync": "save: power loss",
    "no checksum": "job: bit flipped",
    "no lock": TWO_JOBS,
    "latest first": "save: power loss",
}
"""The kind of fault that finds a weakness."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name, Server(Path(name)) as server:
        yield server


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_each_kind_of_fault_once(server: Server) -> None:
    said: list[str] = []
    work = server.work / "quick"
    work.mkdir()
    table = run(work, count=len(TRIALS) + 1, seconds=0, seed=3, settings=[(2, 1)], say=said.append, server=server)
    assert table.problems == [], "\n".join(said)
    assert {kind for kind, _ in table.tried} == {*TRIALS, TWO_JOBS}
    assert "lost" in table.text()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(270)
@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(server: Server, planted: str) -> None:
    work = server.work / planted.replace(" ", "-")
    work.mkdir()
    table = run(
        work, count=60, seconds=0, seed=1, settings=[(2, 1)], kinds=FOUND_BY[planted], planted=planted, hang=20,
        say=lambda text: None, until_found=True, server=server,
    )  # fmt: skip
    assert table.problems, f"{planted} was not found in {table.total} faults"


def test_a_disk_has_what_was_synced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"before")

    def event(kind: int, name: str, other: str = "", at: int = 0, data: bytes = b"") -> disk.Event:
        path = f"{root}/{name}".rstrip("/")
        return disk.Event(kind, path, f"{root}/{other}" if kind == disk.RENAME else other, at, data)

    found = disk.Disk(root)
    for one in (
        event(disk.MKDIR, "folder"),
        event(disk.OPEN, "folder/new", at=7),
        event(disk.WRITE, "folder/new", data=b"0123456789"),
        event(disk.SYNC, "folder/new"),
        event(disk.WRITE, "folder/new", at=10, data=b"lost"),
        event(disk.RENAME, "old", "kept"),
    ):
        found.apply(one)

    def after(how: str) -> dict[str, bytes | None]:
        target = tmp_path / how
        shutil.rmtree(target, ignore_errors=True)
        found.write(target, how, Random(0))
        return {str(path.relative_to(target)): None if path.is_dir() else path.read_bytes()
                for path in target.rglob("*")}  # fmt: skip

    assert after("all") == {"folder": None, "folder/new": b"0123456789lost", "kept": b"before"}
    assert after("names") == {"folder": None, "folder/new": b"0123456789", "kept": b"before"}
    assert after("synced") == {"old": b"before"}
    for one in (event(disk.SYNC, ""), event(disk.SYNC, "folder")):
        found.apply(one)
    assert after("synced") == {"folder": None, "folder/new": b"0123456789", "kept": b"before"}
    assert after("random").keys() == after("all").keys()
