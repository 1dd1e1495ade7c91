"""A folder that is written once: complete files are kept, the rest of an earlier attempt goes, others are refused."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest

from autotp_plan.schemas.errors import OutputError
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME
from autotp_plan.schemas.shards.output_file import OutputFile, temporary_path
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.storage.files import ByteRange

TASK = {"command": "presplit", "plan": "1"}


def folder_at(path: Path, **task: str) -> OutputFolder:
    return OutputFolder(path, {**TASK, **task}, "presplit")


def names(path: Path) -> set[str]:
    return {found.name for found in path.iterdir()}


def begun(path: Path) -> Path:
    """A folder with the complete file `a`, in which the operating system stopped the writing of `b`."""
    with pytest.raises(OutputError, match="presplit was stopped by the operating system"), folder_at(path) as folder:
        folder.write_small("a", b"first")
        output = OutputFile(path / "b", 10, b"head")
        folder.begin(output)
        output.write(memoryview(b"tail"), 4)
        raise OSError(28, os.strerror(28))
    return path


def test_a_file_written_in_any_order_has_its_name_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    with folder_at(tmp_path / "out") as folder:
        output = OutputFile(tmp_path / "out" / "x", 10, b"ab")
        folder.begin(output)
        output.write(memoryview(b"ij"), 8)
        output.copy([ByteRange(tmp_path / "source", 2, 4), ByteRange(tmp_path / "source", 0, 2)], 2)
        assert names(tmp_path / "out") == {JOURNAL_NAME, ".x.tmp"}
        folder.finish(output)
        assert names(tmp_path / "out") == {JOURNAL_NAME, "x"}
        assert (tmp_path / "out" / "x").read_bytes() == b"ab234501ij"
        assert folder.finished["x"] == (10, zlib.crc32(b"ab234501ij"))
        folder.complete()
    assert names(tmp_path / "out") == {"x"}


def test_a_file_with_a_gap_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), folder_at(tmp_path / "out") as folder:
        output = OutputFile(tmp_path / "out" / "x", 10, b"ab")
        folder.begin(output)
        output.write(memoryview(b"ij"), 8)
        folder.finish(output)
    assert names(tmp_path / "out") == {JOURNAL_NAME}


def test_a_file_can_be_written_by_several_who_open_it(tmp_path: Path) -> None:
    with folder_at(tmp_path / "out") as folder:
        first = OutputFile(tmp_path / "out" / "x", 4)
        folder.begin(first)
        first.close()
        others = [OutputFile(tmp_path / "out" / "x", 4) for _ in range(2)]
        for place, other in enumerate(others):
            other.open()
            other.write(memoryview(b"%d%d" % (place, place)), 2 * place)
            other.close()
        first.open()
        first.blocks = [block for other in others for block in other.blocks]
        folder.finish(first)
        folder.complete()
    assert (tmp_path / "out" / "x").read_bytes() == b"0011"


def test_what_was_complete_is_kept_and_what_was_not_is_removed(tmp_path: Path) -> None:
    path = begun(tmp_path / "out")
    assert names(path) == {JOURNAL_NAME, "a"}
    number = (path / "a").stat().st_ino
    with folder_at(path) as folder:
        folder.resume({"a": 5, "b": 10}, workers=1)
        assert set(folder.finished) == {"a"}
        folder.write_small("a", b"other")
        folder.complete()
    assert (path / "a").read_bytes() == b"first" and (path / "a").stat().st_ino == number


@pytest.mark.parametrize("content", [b"fIrst", b"firs", b"first "])
def test_a_complete_file_that_changed_is_written_again(tmp_path: Path, content: bytes) -> None:
    path = begun(tmp_path / "out")
    (path / "a").write_bytes(content)
    with folder_at(path) as folder:
        folder.resume({"a": 5, "b": 10}, workers=1)
        assert folder.finished == {} and names(path) == {JOURNAL_NAME}


def test_a_restart_keeps_nothing(tmp_path: Path) -> None:
    path = begun(tmp_path / "out")
    with folder_at(path) as folder:
        folder.restart(["a", "b"])
        assert folder.finished == {} and names(path) == {JOURNAL_NAME}
        assert json.loads((path / JOURNAL_NAME).read_text()) == TASK
    with folder_at(path) as folder:
        assert folder.finished == {}, "what was removed is not in the journal either"


def test_what_is_not_ours_is_refused_and_stays(tmp_path: Path) -> None:
    path = begun(tmp_path / "out")
    (path / "mine").write_text("precious")
    for begin in (lambda f: f.resume({"a": 5}, workers=1), lambda f: f.restart(["a"])):
        with folder_at(path) as folder, pytest.raises(OutputError, match="mine"):
            begin(folder)
    assert names(path) == {JOURNAL_NAME, "a", "mine"}


def test_another_task_is_refused(tmp_path: Path) -> None:
    path = begun(tmp_path / "out")
    with pytest.raises(OutputError, match="begun with another plan"), folder_at(path, plan="2"):
        pass
    assert names(path) == {JOURNAL_NAME, "a"}


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    writes = pytest.raises(OutputError, match="another process writes it")
    with folder_at(tmp_path / "out"), writes, folder_at(tmp_path / "out"):
        pass
    with folder_at(tmp_path / "out"):
        pass  # the lock ended with the first block


def test_a_temporary_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("keep")
    with pytest.raises(OutputError), folder_at(tmp_path / "out") as folder:
        output = OutputFile(tmp_path / "out" / "x", 3, b"abc")
        temporary_path(output.path).symlink_to(tmp_path / "outside")
        folder.begin(output)
    assert (tmp_path / "outside").read_text() == "keep"


def test_a_folder_that_another_finishes_before_the_journal_is_made_stays(tmp_path: Path) -> None:
    """The journal of the other one is gone by then, and its files have the names that this one would write."""
    task, folder = {"command": "test"}, tmp_path / "out"

    class Late(OutputFolder):
        def _refuse_what_is_there(self) -> None:
            super()._refuse_what_is_there()
            with OutputFolder(folder, task, "first") as first:
                first.restart(["a", MANIFEST_NAME])
                first.write_small("a", b"of the first")
                first.write_small(MANIFEST_NAME, b"{}")
                first.complete()

    with pytest.raises(OutputError, match="another process has just finished it"), Late(folder, task, "late") as late:
        late.restart(["a", MANIFEST_NAME])
    assert sorted(path.name for path in folder.iterdir()) == sorted(["a", MANIFEST_NAME])
    assert (folder / "a").read_bytes() == b"of the first"
