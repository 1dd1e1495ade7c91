"""One folder, many writers: parts in any order, at once, killed, and started again make what one process makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.planner import check_shards, compile_plan, presplit
from autotp_plan.planner.cli.main import main
from autotp_plan.planner.copying import copy_engine
from autotp_plan.schemas.errors import OptionError, OutputError, ShardsError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME, Manifest
from autotp_plan.schemas.shards.parts import Part, find_parts
from tests.helpers.faults import SMALL_FILES, prepare
from tests.helpers.paths import ROOT
from tests.helpers.random_shards import files_of, random_model, random_plan, write_random

pytestmark = pytest.mark.sweep

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes: a checkpoint, its plan, and what undisturbed runs make of it."""
    return prepare(tmp_path_factory.mktemp("parts"))


def write(work: Path, output: Path, number: int, count: int, **options: Any) -> Manifest | None:
    """Write a part of the checkpoint of `work`."""
    given = {"max_file_bytes": SMALL_FILES, **options}
    return presplit(Plan.read(work / "plan.json"), work / "original", output, part=(number, count), **given)


def numbers(output: Path) -> dict[str, int]:
    """The file numbers of what is in a folder."""
    return {path.name: path.stat().st_ino for path in output.glob("[!.]*")}


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    random=st.randoms(use_true_random=False),
    tp_size=st.integers(1, 4),
    count=st.integers(1, 6),
    most=st.sampled_from([20, 100, 1 << 30]),
)
def test_parts_in_any_order_make_the_same_folder(random: Random, tp_size: int, count: int, most: int) -> None:
    model = random_model(random)
    plan = random_plan(model, tp_size, random)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        original = write_random(model, folder / "original", random)
        options: Any = {"max_file_bytes": most, "workers": random.choice((1, 2))}
        presplit(plan, original, folder / "expected", **options)
        order = random.sample(range(1, count + 1), count)
        written = [presplit(plan, original, folder / "out", part=(number, count), **options) for number in order]
        assert written[:-1] == [None] * (count - 1)
        assert written[-1] == Manifest.read(folder / "out")
        assert files_of(folder / "out") == files_of(folder / "expected")


def schedules(work: Path, scenario: str, seeds: int, planted: str = "") -> subprocess.CompletedProcess[str]:
    """Run `tests.helpers.part_schedules`."""
    command = [sys.executable, "-m", "tests.helpers.part_schedules", scenario, str(work), str(seeds), planted]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("scenario", "seeds"),
    [
        ("kill", 0),
        ("killed at any moment", 5),
        ("at once and killed", 8),
        ("two writers of a part without locks", 12),
    ],
)
def test_stopped_and_killed_at_any_call(work: Path, scenario: str, seeds: int) -> None:
    """At no moment there is a file that is not complete, or a manifest without a file; the end is the same folder."""
    done = schedules(work, scenario, seeds)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario", ["killed at any moment", "at once", "at once and killed", "two writers of a part without locks"]
)
def test_many_schedules(work: Path, scenario: str) -> None:
    done = schedules(work, scenario, 150)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("scenario", "planted"),
    [
        ("at once", "a record before the files are complete"),
        ("two writers of a part without locks", "files without a note are removed"),
    ],
)
def test_a_planted_error_is_found(work: Path, scenario: str, planted: str) -> None:
    done = schedules(work, scenario, 1000, planted)  # it ends with the first that shows it: one in 20 does
    assert done.returncode == 1 and re.search(
        "AssertionError: .*(are not complete|a manifest without|not what one process|exit status 2)", done.stderr
    ), done.stderr


def test_a_missing_part_is_named(work: Path, tmp_path: Path) -> None:
    output, command = tmp_path / "out", ["presplit", str(work / "plan.json"), "--checkpoint", str(work / "original")]
    run = CliRunner()
    for number in (4, 1, 3):
        done = run.invoke(main, [*command, "-o", str(output), "--part", f"{number}/4"])
        assert done.exit_code == 0
    assert "part 3/4 in" in done.output and "3 of 4 parts are complete, 2 is not begun" in done.output
    assert not (output / MANIFEST_NAME).exists()
    checked = run.invoke(main, ["check", str(output)])
    assert checked.exit_code == 2 and "3 of 4 parts are complete, 2 is not begun" in checked.output
    assert "run presplit again with --part 2/4" in checked.output
    with pytest.raises(ShardsError, match="3 of 4 parts"):
        check_shards(output)
    done = run.invoke(main, [*command, "-o", str(output), "--part", "2/4"])
    assert done.exit_code == 0 and "for 2 ranks" in done.output
    assert run.invoke(main, ["check", str(output)]).exit_code == 0


def test_no_such_part(work: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main,
        [
            "presplit",
            str(work / "plan.json"),
            "--checkpoint",
            str(work / "original"),
            "-o",
            str(tmp_path / "x"),
            "--part",
            "8",
        ],
    )
    assert done.exit_code == 2 and "there is no such part" in done.output
    for part in ((0, 2), (3, 2)):
        with pytest.raises(OptionError, match="there is no such part"):
            write(work, tmp_path / "x", *part)
    assert not (tmp_path / "x").exists()


def test_a_part_reads_and_writes_its_share_only(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_plan(work / "original", tp_size=4)
    read = 0
    real = os.preadv

    def counted(*args: Any) -> int:
        nonlocal read
        got = real(*args)
        read += got
        return got

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(copy_engine, "CHUNK_BYTES", 256)  # of the tensors here, which are small
    bytes_read, shares, before = [], [], set[str]()
    for number in range(1, 5):
        read = 0
        presplit(plan, work / "original", tmp_path / "out", part=(number, 4), workers=1)
        bytes_read.append(read)
        names = {path.name for path in (tmp_path / "out").glob("[!.]*")}
        shares.append(sum((tmp_path / "out" / name).stat().st_size for name in names - before))
        before = names
    total = sum(path.stat().st_size for path in (work / "original").iterdir())
    assert max(shares) < 0.45 * sum(shares)
    assert max(bytes_read) < 0.75 * total, "of column-parallel weights only the rows of the part's ranks are read"


def test_a_complete_part_is_not_written_again(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(work, output, 1, 2)
    before = numbers(output)
    assert write(work, output, 1, 2) is None
    assert numbers(output) == before
    assert write(work, output, 2, 2) is not None
    before = numbers(output)
    for number in (1, 2):  # the array job is submitted once more
        assert write(work, output, number, 2) == Manifest.read(output)
    assert numbers(output) == before and files_of(output) == files_of(work / "presplit")


def test_a_file_that_changed_after_its_part_was_complete(work: Path, tmp_path: Path) -> None:
    """One that is gone is found when the folder is finished; the part writes again what is not as it was."""
    output = tmp_path / "out"
    write(work, output, 1, 2)
    first, second = sorted(output.glob("tp-*"))[:2]
    first.unlink()
    with pytest.raises(OutputError, match=f"part 1 with {first.name} missing or changed") as caught:
        write(work, output, 2, 2)
    assert "run presplit with --part 1/2 again" in str(caught.value) and not (output / MANIFEST_NAME).exists()
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    assert write(work, output, 1, 2) is not None
    assert files_of(output) == files_of(work / "presplit")


def test_a_manifest_was_written_and_the_journals_remained(work: Path, tmp_path: Path) -> None:
    output = shutil.copytree(work / "presplit", tmp_path / "out")
    (output / Part(1, 2).journal_name).touch()
    (output / Part(2, 2).record_name).touch()
    check_shards(output)
    assert write(work, output, 2, 2) is not None
    assert files_of(output) == files_of(work / "presplit")


def test_other_ways_to_write_the_folder_are_refused(work: Path, tmp_path: Path) -> None:
    """And what was begun can be finished after all."""
    plan, output = Plan.read(work / "plan.json"), tmp_path / "out"
    write(work, output, 1, 2)
    before = files_of(output)

    def refused(message: str, folder: Path = output, number: int = 1, count: int = 2, **options: Any) -> None:
        with pytest.raises(OutputError, match=message):
            write(work, folder, number, count, **options)

    with pytest.raises(OutputError, match="begun in 2 parts") as caught:
        presplit(plan, work / "original", output, max_file_bytes=SMALL_FILES)
    assert "finish it with --part 2/2" in str(caught.value)
    refused("begun with another number of parts", number=2, count=4)
    refused("begun with another file size", max_file_bytes=SMALL_FILES + 1)
    refused("begun with another file size", number=2, max_file_bytes=SMALL_FILES + 1)
    with pytest.raises(OutputError, match="begun with another plan"):
        presplit(
            compile_plan(work / "original", tp_size=4),
            work / "original",
            output,
            part=(2, 2),
            max_file_bytes=SMALL_FILES,
        )
    with pytest.raises(OutputError, match="begun with another source"):
        presplit(plan, work / "further", output, part=(2, 2), max_file_bytes=SMALL_FILES)
    assert files_of(output) == before, "who is refused leaves nothing"
    (output / "notes.txt").write_text("mine")
    refused("notes.txt", number=2)
    (output / "notes.txt").unlink()
    assert write(work, output, 2, 2) is not None
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / JOURNAL_NAME).touch()
    refused("begun without --part", tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == [JOURNAL_NAME]
    presplit(plan, work / "original", tmp_path / "whole", max_file_bytes=SMALL_FILES)
    assert files_of(tmp_path / "whole") == files_of(work / "presplit")
    refused("a folder that is finished", shutil.copytree(work / "reshard", tmp_path / "other"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused("a folder that is not empty", tmp_path / "full")


def test_a_second_writer_of_a_part_is_refused(work: Path, tmp_path: Path) -> None:
    import fcntl

    write(work, tmp_path / "out", 1, 2)
    with (tmp_path / "out" / Part(2, 2).journal_name).open("w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process writes it"):
            write(work, tmp_path / "out", 2, 2)
        assert write(work, tmp_path / "out", 1, 2) is None, "the other parts are free"
    found = find_parts(tmp_path / "out")
    assert found is not None and str(found) == "1 of 2 parts are complete, 2 is begun"
    assert write(work, tmp_path / "out", 2, 2) is not None
