"""Stopped at any moment, a command continues: what was complete is kept, and the result is what it would have been."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from autotp_plan.planner import check_shards, compile_plan, merge, presplit, reshard
from autotp_plan.runtime.loading.weights import open_weights
from autotp_plan.schemas.errors import AutoTPError, OutputError, ShardsError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import read_shards
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME
from autotp_plan.schemas.shards.output_folder import OutputFolder
from tests.helpers.faults import (
    SMALL_FILES,
    check_no_half_files,
    corrupt,
    job_of,
    kill_until_done,
    prepare,
    run_job,
)
from tests.helpers.random_shards import files_of
from tests.helpers.stopped import stopped

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes: a checkpoint, its plan, and what undisturbed runs make of it."""
    return prepare(tmp_path_factory.mktemp("life"))


COMMANDS = pytest.mark.parametrize("command", ["presplit", "merge", "reshard"])


@COMMANDS
def test_killed_at_random_moments(work: Path, tmp_path: Path, command: str) -> None:
    before = files_of(work / "original")
    hit = kill_until_done(job_of(work, command, tmp_path / "out"), Random(command), kills=3, pause=0.01, longest=0.7)
    assert hit > 0
    assert files_of(tmp_path / "out") == files_of(work / command)
    assert files_of(work / "original") == before


@COMMANDS
@pytest.mark.parametrize("call", ["pwritev", "fsync", "preadv", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_after_any_failed_call_the_command_resumes_to_the_same_bytes(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, call: str, code: int
) -> None:
    """The k-th call fails, then a later one, until it goes through: nothing is lost, and no file stays open."""
    home: Any = Path if call == "replace" else os
    real: Callable[..., Any] = getattr(home, call)
    left = 0

    def failing(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(home, call, failing)
    task = job_of(work, command, tmp_path / "out")
    random = Random(f"{command} {call} {code}")
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    failures, kept = 0, set[str]()
    while True:
        left = random.randint(1, 12 if failures else 3)
        if failures > 25:
            monkeypatch.setattr(home, call, real)
        try:
            run_job(task, workers=random.choice((1, 3)))
            break
        except OutputError as error:
            failures += 1
            assert os.strerror(code) in str(error) and "again" in str(error)
        check_no_half_files(tmp_path / "out")
        assert not list((tmp_path / "out").glob(".*.tmp")), "what is half done gives its space back"
        names = {path.name for path in (tmp_path / "out").glob("[!.]*.safetensors")}
        assert call == "preadv" or kept <= names, "what was complete is kept"
        kept = names
        assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    assert failures > 0
    assert files_of(tmp_path / "out") == files_of(work / command)


@COMMANDS
def test_a_full_disk_stops_the_command_which_then_resumes(work: Path, tmp_path: Path, command: str) -> None:
    """A file may not grow beyond a limit (the kernel says no, as it does on a full disk); then it may."""
    code = """
import json, resource, signal, sys
from autotp_plan.schemas.errors import AutoTPError
from tests.helpers.faults import run_job
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try:
    run_job(json.loads(sys.argv[1]))
except AutoTPError as error:
    sys.exit(str(error))
"""
    task = job_of(work, command, tmp_path / "out")
    run = subprocess.run([sys.executable, "-c", code, json.dumps(task)], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "File too large" in run.stderr, run.stderr
    check_no_half_files(tmp_path / "out")
    run_job(task)
    assert files_of(tmp_path / "out") == files_of(work / command)


def stop_after(work: Path, output: Path, monkeypatch: pytest.MonkeyPatch, files: int = 3) -> None:
    """A presplit that ends when so many files are complete."""
    stopped(lambda: run_job(job_of(work, "presplit", output)), monkeypatch, files)


def test_complete_files_are_kept_and_verified(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    stop_after(work, output, monkeypatch)
    kept = sorted(path for path in output.iterdir() if not path.name.startswith("."))
    assert len(kept) >= 3
    numbers = {path.name: path.stat().st_ino for path in kept}
    broken, shortened, *sound = kept
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    os.truncate(shortened, 10)
    run_job(job_of(work, "presplit", output))
    assert files_of(output) == files_of(work / "presplit")
    assert all(path.stat().st_ino == numbers[path.name] for path in sound), "not written a second time"


def test_an_unfinished_folder_is_no_shards_folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(work, tmp_path / "out", monkeypatch)
    plan = Plan.read(work / "plan.json")
    for run in (
        read_shards,
        check_shards,
        lambda folder: merge(folder, tmp_path / "x"),
        lambda folder: open_weights(folder, plan),
    ):
        with pytest.raises(ShardsError, match=f"shards without {MANIFEST_NAME}"):
            run(tmp_path / "out")


def test_a_torn_journal_makes_the_last_files_be_written_again(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line was half written, or all of it was lost: whatever is not noted is written again."""
    for lost in (1, 20, 10_000):
        output = tmp_path / str(lost)
        stop_after(work, output, monkeypatch)
        journal = output / JOURNAL_NAME
        os.truncate(journal, max(0, journal.stat().st_size - lost))
        run_job(job_of(work, "presplit", output))
        assert files_of(output) == files_of(work / "presplit")


def test_another_plan_source_or_command_is_refused(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    stop_after(work, output, monkeypatch)
    before = files_of(output)
    plan = Plan.read(work / "plan.json")

    def refused(run: Callable[[], object]) -> str:
        with pytest.raises(OutputError) as caught:
            run()
        assert files_of(output) == before
        return str(caught.value)

    options: Any = {"max_file_bytes": SMALL_FILES}
    other = compile_plan(work / "original", tp_size=4)
    assert "begun with another plan" in refused(lambda: presplit(other, work / "original", output, **options))
    assert "begun with another source" in refused(lambda: presplit(plan, work / "further", output, **options))
    assert "begun with another file size" in refused(lambda: presplit(plan, work / "original", output))
    assert "begun with another command" in refused(lambda: reshard(work / "presplit", output, plan=plan, **options))
    (output / "notes.txt").write_text("mine")
    before = files_of(output)
    assert "notes.txt" in refused(lambda: presplit(plan, work / "original", output, **options))


def test_a_second_process_on_one_folder_is_refused(work: Path, tmp_path: Path) -> None:
    task = job_of(work, "presplit", tmp_path / "out")
    begun = OutputFolder(tmp_path / "out", {"command": "x"}, "presplit")
    with begun, pytest.raises(OutputError, match="another process writes it"):
        run_job(task)
    script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (tmp_path / "held").mkdir()
    journal = tmp_path / "held" / JOURNAL_NAME
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(journal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    task = job_of(work, "presplit", tmp_path / "held")
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(OutputError, match="another process writes it"):
            run_job(task)
    finally:
        holder.kill()
        holder.communicate()
    run_job(task)  # the lock ended with the process
    assert files_of(tmp_path / "held") == files_of(work / "presplit")


@COMMANDS
def test_a_finished_folder_is_not_written_again(work: Path, tmp_path: Path, command: str) -> None:
    """A kill may come when all is done: the same command again finds that, and anything else is refused."""
    output = shutil.copytree(work / command, tmp_path / "out")
    numbers = {path.name: path.stat().st_ino for path in output.iterdir()}
    run_job(job_of(work, command, output))
    assert numbers == {path.name: path.stat().st_ino for path in output.iterdir()}
    path = next(output.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OutputError, match="a folder that is not empty"):
        run_job(job_of(work, command, output))


@pytest.mark.parametrize("seed", range(40))
def test_any_corruption_is_found(work: Path, tmp_path: Path, seed: int) -> None:
    """By `check`, and by the runtime: what no checksum is needed for, always."""
    folder = shutil.copytree(work / "presplit", tmp_path / "shards")
    plan = Plan.read(work / "plan.json")
    open_weights(folder, plan, verify_checksums=True)
    how = corrupt(folder, work / "other", Random(seed))
    with pytest.raises(AutoTPError):
        print(how, check_shards(folder))
    with pytest.raises(AutoTPError):
        open_weights(folder, plan, verify_checksums=True)
    if how.split()[0] in ("truncate", "append", "missing", "foreign", "link"):
        with pytest.raises(AutoTPError):
            open_weights(folder, plan)


@pytest.mark.parametrize("owner", ["tp-00-of-02", "shared"])
def test_files_of_another_run_are_found_without_checksums(work: Path, tmp_path: Path, owner: str) -> None:
    folder = shutil.copytree(work / "presplit", tmp_path / "shards")
    source = next((work / "other").glob(f"{owner}.*"))
    shutil.copyfile(source, folder / source.name)
    with pytest.raises(ShardsError, match="a file of another checkpoint"):
        open_weights(folder, Plan.read(work / "plan.json"))
