"""Checkpoints of a job: every changed byte is found, wherever torch is not."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotp_plan.planner.cli.main import main
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import CheckpointError, DocumentError
from autotp_plan.schemas.jobs.job_folder import checked_tag, is_job, latest, newest_sound, remove_older, sealed, tags
from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME, LATEST_NAME, JobManifest

PLAN = "sha256:" + 64 * "a"


def manifest(step: int) -> JobManifest:
    return JobManifest(
        plan=PLAN, tp_size=2, dp_size=1, zero_stage=1, position=(0, 4 * step), step=step, client_state=("mine",)
    )


def save(folder: Path, step: int, at: int) -> None:
    """A checkpoint as `save_checkpoint` leaves it."""
    tag = folder / f"step{step}"
    (tag / "deep").mkdir(parents=True)
    for number, name in enumerate(("mp_rank_00.pt", "mp_rank_01.pt", "deep/of_nvme.swp")):
        (tag / name).write_bytes(random.Random(f"{step} {number}").randbytes(1000 + number))
    files = sorted(file for path in tag.rglob("*.*") for file in sealed(tag, [path], 0))
    written = JobManifest(
        **{**{name: getattr(manifest(step), name) for name in JobManifest.__slots__}, "files": tuple(files)}
    )
    (tag / ABOUT_NAME).write_text(written.to_json())
    os.utime(tag / ABOUT_NAME, ns=(at, at))
    (folder / LATEST_NAME).write_text(tag.name)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    save(folder, 9, at=1_000)
    save(folder, 10, at=2_000)
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_manifest_is_read_as_it_was_written(job: Path) -> None:
    found = JobManifest.read(job / "step10")
    assert found.step == 10 and found.position == (0, 40) and found.client_state == ("mine",)
    assert [file.name for file in found.files] == ["deep/of_nvme.swp", "mp_rank_00.pt", "mp_rank_01.pt"]
    assert found.to_json() == (job / "step10" / ABOUT_NAME).read_text()
    assert is_job(job) and latest(job) == "step10" and tags(job) == ["step10", "step9"]
    assert newest_sound(job) == "step10" and newest_sound(job, besides="step10") == "step9"


def test_a_manifest_from_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    old = {"plan": PLAN, "tp_size": 2, "dp_size": 2, "zero_stage": 1, "position": None, "step": 4,
           "this_mesh_only": "", "client_state": []}  # fmt: skip
    (tmp_path / "step4").mkdir()
    (tmp_path / "step4" / ABOUT_NAME).write_text(json.dumps(old))
    found = checked_tag(tmp_path, "step4")
    assert found.manifest is not None and found.manifest.files == () and not found.faults
    assert newest_sound(tmp_path) is None, "nobody knows whether it is"


ATTACKS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda tag: flip(tag / "mp_rank_01.pt"),
    "flipped in a folder": lambda tag: flip(tag / "deep" / "of_nvme.swp"),
    "shorter": lambda tag: os.truncate(tag / "mp_rank_00.pt", 10),
    "empty": lambda tag: os.truncate(tag / "mp_rank_00.pt", 0),
    "missing": lambda tag: (tag / "mp_rank_00.pt").unlink(),
    "of another step": lambda tag: shutil.copy(tag.parent / "step9" / "mp_rank_01.pt", tag / "mp_rank_01.pt"),
    "manifest flipped": lambda tag: flip(tag / ABOUT_NAME),
    "manifest empty": lambda tag: (tag / ABOUT_NAME).write_text(""),
    "another mesh in the manifest": lambda tag: (tag / ABOUT_NAME).write_text(
        (tag / ABOUT_NAME).read_text().replace('"dp_size": 1', '"dp_size": 2')
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_changed_is_found_and_the_one_before_is_named(job: Path, attack: str) -> None:
    ATTACKS[attack](job / "step10")
    assert checked_tag(job, "step10").faults and not checked_tag(job, "step9").faults
    assert newest_sound(job) == "step9"
    result = CliRunner().invoke(main, ["check", str(job)])
    assert result.exit_code == 2 and 'resume from "step9"' in result.stderr, result.output
    assert "step10 (latest): not sound" in result.stdout and "step9: sound" in result.stdout


def test_every_flipped_byte_is_found(job: Path) -> None:
    tag, rng = job / "step10", random.Random(7)
    for _ in range(200):
        path = rng.choice([path for path in tag.rglob("*") if path.is_file()])
        before = path.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert checked_tag(job, "step10").faults, path.name
        path.write_bytes(before)
    assert not checked_tag(job, "step10").faults


def test_check_lists_the_checkpoints(job: Path) -> None:
    (job / "step11").mkdir()  # of a save that died
    result = CliRunner().invoke(main, ["check", str(job)])
    assert result.exit_code == 0 and result.stdout.splitlines() == [
        "step10 (latest): sound, every checksum is right (3 files, 2.93 KiB)",
        "step9: sound, every checksum is right (3 files, 2.93 KiB)",
    ]


@pytest.mark.parametrize(
    "text", ["", "\n", "../step9", "a/b", "step\x1b10", b"\xff\xfe".decode("latin-1") + "\0", "step10" * 100]
)
def test_a_damaged_latest_is_said(job: Path, text: str) -> None:
    (job / LATEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="the latest checkpoint is damaged"):
        latest(job)
    result = CliRunner().invoke(main, ["check", str(job)])
    assert result.exit_code == 2 and 'resume from "step10"' in result.stderr


def test_a_latest_that_is_gone_is_said(job: Path) -> None:
    (job / LATEST_NAME).write_text("step11")
    result = CliRunner().invoke(main, ["check", str(job)])
    assert result.exit_code == 2 and "not complete" in result.stderr and 'resume from "step10"' in result.stderr
    (job / LATEST_NAME).unlink()
    assert latest(job) is None
    assert 'resume from "step10"' in CliRunner().invoke(main, ["check", str(job)]).stderr


def test_older_checkpoints_are_removed_and_the_latest_never(job: Path) -> None:
    save(job, 11, at=3_000)
    (job / LATEST_NAME).write_text("step9")
    assert remove_older(job, 1) == ["step10"] and tags(job) == ["step11", "step9"]
    (job / LATEST_NAME).write_text("step11")
    assert remove_older(job, 5) == [] and remove_older(job, 1) == ["step9"]
    assert newest_sound(job) == "step11" and sorted(path.name for path in job.iterdir()) == [LATEST_NAME, "step11"]


def test_another_major_version_is_refused(job: Path) -> None:
    path = job / "step10" / ABOUT_NAME
    path.write_text(path.read_text().replace('"version": "1.0"', '"version": "2.0"'))
    with pytest.raises(DocumentError, match="another format version"):
        JobManifest.read(job / "step10")


def test_a_file_without_its_rank_is_no_part_of_a_manifest(job: Path) -> None:
    """With a fingerprint that fits, as a program that changes documents found it: it was a TypeError."""
    path = job / "step10" / ABOUT_NAME
    data = json.loads(path.read_text())
    for key in ("name", "size", "crc32", "rank"):
        rest = {**data, "files": [{one: value for one, value in file.items() if one != key} for file in data["files"]]}
        del rest["fingerprint"]
        path.write_text(json.dumps({**rest, "fingerprint": documents.fingerprint(rest)}))
        with pytest.raises(DocumentError, match="lacks a key"):
            JobManifest.read(job / "step10")
