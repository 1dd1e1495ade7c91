"""System calls that do less than they were asked for, names of any length, and what is advised for each error."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import check_shards, compile_plan, merge, presplit
from autotp_plan.schemas.errors import OutputError
from autotp_plan.schemas.shards.output_file import MAX_NAME_BYTES, temporary_path
from autotp_plan.schemas.shards.stopped import next_step
from tests.helpers.checkpoints import write_llama
from tests.helpers.random_shards import files_of


def test_reads_and_writes_that_come_short_for_good_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "model", num_files=2)
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, tmp_path / "straight")
    preadv, pwritev, pread = os.preadv, os.pwritev, os.pread

    def seven(buffers: Any) -> list[memoryview]:
        return [memoryview(buffers[0])[:777]]

    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, seven(buffers), at))
    monkeypatch.setattr(os, "pread", lambda file, length, at: pread(file, min(length, 777), at))
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, at: pwritev(file, seven(buffers), at))
    presplit(plan, folder, tmp_path / "short")
    assert files_of(tmp_path / "short") == files_of(tmp_path / "straight"), "the fingerprint too"


def test_a_write_that_takes_nothing_is_an_error_and_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "model")
    plan = compile_plan(folder, tp_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda *_: 0)
        with pytest.raises(OutputError, match=r"(?s)takes no more bytes.*dmesg"):
            presplit(plan, folder, tmp_path / "out")
    presplit(plan, folder, tmp_path / "out")
    check_shards(tmp_path / "out")


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * (MAX_NAME_BYTES + 1)])
def test_a_name_as_long_as_a_file_system_takes_is_copied(tmp_path: Path, name: str) -> None:
    folder = write_llama(tmp_path / "model")
    (folder / name).write_text("long")
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, tmp_path / "out")
    for number in (1, 2):
        presplit(plan, folder, tmp_path / "parts", part=(number, 2))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "out")
    merge(tmp_path / "out", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)


def test_temporary_names_of_two_long_names_differ() -> None:
    one, other = (temporary_path(Path("x" * 250 + end)) for end in "ab")
    assert one != other and len(one.name) < 255
    assert temporary_path(Path("short")).name == ".short.tmp"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free space on the file system of /out/x, and run presplit again: it resumes"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "dmesg"),
        (errno.EACCES, "the right to read and write /out/x"),
        (errno.EROFS, "mount"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "fewer --workers"),
        (errno.ENAMETOOLONG, "give the file of /out/x a shorter name"),
        (errno.ENOTTY, "correct what is wrong, and run presplit again: it resumes"),
    ],
)
def test_the_advice_fits_the_error(code: int, advice: str) -> None:
    assert advice in next_step(OSError(code, os.strerror(code), "/out/x"), Path("/out"), "presplit")


def test_the_advice_for_a_file_that_ends_early() -> None:
    assert "let the input stay as it is" in next_step(EOFError("ended 3 bytes early"), Path("/out"), "presplit")


def test_a_file_that_the_checkpoint_does_not_have_any_more_is_removed_from_what_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "model")
    plan = compile_plan(folder, tp_size=2)
    presplit(plan, folder, tmp_path / "straight")
    (folder / "notes.md").write_text("first")
    replace = Path.replace

    (folder / "z.md").write_text("last")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: _until("z.md", replace, self, target))
        with pytest.raises(OutputError):
            presplit(plan, folder, tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").exists()
    (folder / "notes.md").unlink()
    (folder / "z.md").unlink()
    presplit(plan, folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


def _until(name: str, replace: Any, source: Path, target: Path) -> Path:
    if Path(target).name == name:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    moved: Path = replace(source, target)
    return moved
