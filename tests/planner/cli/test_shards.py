"""The commands on shards, as a user meets them: plain lines where there is no terminal, and what to do next."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.planner.cli import output
from autotp_plan.planner.cli.main import main
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    original = write_llama(tmp_path / "original", num_files=2)
    plan = compile_plan(original, tp_size=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    presplit(plan, original, tmp_path / "shards")
    return tmp_path / "shards"


def run(*arguments: Any, status: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_check_merge_and_reshard_give_the_same_bytes_back(shards: Path, tmp_path: Path) -> None:
    assert "sound, every checksum is right (6 files" in run("check", shards).stdout
    assert "is sound and" in run("check", shards, "--checkpoint", tmp_path / "original").stdout
    assert ": the checkpoint, " in run("merge", shards, "-o", tmp_path / "merged").stdout
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "original")
    assert "for 4 ranks in" in run("reshard", shards, "--tp", 4, "-o", tmp_path / "four").stdout
    assert (
        run("reshard", tmp_path / "four", "--plan", tmp_path / "plan.json", "-o", tmp_path / "two", "--quiet").output
        == ""
    )
    assert files_of(tmp_path / "two") == files_of(shards)


def test_progress_in_plain_lines(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_LINE_SECONDS", 0.0)
    lines = run("merge", shards, "-o", tmp_path / "merged").stderr.splitlines()
    assert len(lines) > 3 and all(line.startswith("merge: ") and line.isprintable() for line in lines)
    assert "(100%)" in lines[-1] and "/s, 0 s left" in lines[-1]


def test_wrong_options_and_damaged_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    assert "either --tp or --plan" in run("reshard", shards, "-o", tmp_path / "x", status=2).stderr
    both = ("--tp", 4, "--plan", tmp_path / "plan.json")
    assert "either --tp or --plan" in run("reshard", shards, *both, "-o", tmp_path / "x", status=2).stderr
    assert "the shards manifest" in run("merge", tmp_path / "original", "-o", tmp_path / "x", status=2).stderr
    assert "not empty" in run("merge", shards, "-o", shards, status=2).stderr
    copied = shutil.copytree(shards, tmp_path / "copied")
    path = next(copied.glob("tp-00*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    found = run("check", copied, status=2).stderr
    assert path.name in found and "CRC-32" in found
    assert not (tmp_path / "x").exists()
