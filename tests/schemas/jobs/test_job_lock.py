"""One job writes to a folder; a live one is never taken for a dead one, and a dead one never blocks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autotp_plan.schemas.errors import OutputError
from autotp_plan.schemas.jobs.job_lock import LOCK_NAME, Owner, claim, owner_of, release
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME

HOLDER = """
import sys, time
from pathlib import Path
from autotp_plan.schemas.jobs.job_lock import claim
claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def another_job(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_live_owner_is_named_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    with another_job(tmp_path / "job") as process:
        with pytest.raises(OutputError, match="another job writes to this folder") as caught:
            claim(tmp_path / "job", take_over=True)  # a lock that is held is proof
        assert f"process {process.pid} on " in caught.value.faults[0].got
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(OutputError):
            claim(tmp_path / "job")
        process.send_signal(signal.SIGKILL)
        process.wait()
        claim(tmp_path / "job")
    claim(tmp_path / "job")  # again, by the owner
    owner = owner_of(tmp_path / "job")
    assert owner is not None and owner.pid == os.getpid() and not owner.is_dead
    release(tmp_path / "job")
    assert owner_of(tmp_path / "job") is None
    with another_job(tmp_path / "job"):
        pass


def test_a_folder_that_was_removed_and_made_again_is_claimed_again(tmp_path: Path) -> None:
    claim(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
    claim(tmp_path / "job")
    assert owner_of(tmp_path / "job") is not None
    release(tmp_path / "job")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_the_named_owner_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    me = Owner.me()
    lock = tmp_path / LOCK_NAME
    living = {"host": me.host, "pid": os.getppid(), "began": 0, "since": "now", "job": "17"}
    living["began"] = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    lock.write_text(json.dumps(living))
    with pytest.raises(OutputError, match="take_over=True") as caught:
        claim(tmp_path)
    assert "job 17" in caught.value.faults[0].got and owner_of(tmp_path) == Owner(**living)  # type: ignore[arg-type]
    lock.write_text(json.dumps({**living, "host": "elsewhere"}))
    with pytest.raises(OutputError):
        claim(tmp_path)
    claim(tmp_path, take_over=True)
    release(tmp_path)
    lock.write_text(json.dumps({**living, "began": 5}))  # another process has its number now
    claim(tmp_path)
    release(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST_NAME, JOURNAL_NAME])
def test_a_folder_of_shards_is_not_made_a_job(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match="into a folder of shards"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_what_a_lock_file_holds_never_blocks(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    claim(tmp_path)
    release(tmp_path)
