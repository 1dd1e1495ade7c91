"""The quick part of `python -m benchmarks.fuzz_documents`: changed documents, in seconds and without a traceback."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from benchmarks import fuzz_documents
from benchmarks.fuzz_documents import Kind, fuzz, run_alone


@pytest.mark.sweep
@pytest.mark.timeout(280)
def test_changed_documents() -> None:
    counts, wrong = fuzz(50, seed=7, seconds=10, memory=1 << 30)
    assert not wrong
    assert len(counts) == 10 and set(counts.values()) == {5}


@pytest.mark.timeout(120)
def test_what_goes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a loop without end, and memory without end."""
    kind = Kind(tmp_path / "given.json", {}, (("show", "x"),))

    def takes_all() -> None:
        found = []
        while True:
            found.append(bytes(1 << 20))

    def never_ends() -> None:
        while True:
            pass

    class Broken:
        def __init__(self, action: object) -> None:
            self.action = action

        def invoke(self, *_: object) -> object:
            import click

            @click.command()
            def broken() -> None:
                self.action()  # type: ignore[operator]

            from click.testing import CliRunner

            return CliRunner().invoke(broken, [])

    for action, expected in ((lambda: 1 // 0, "ZeroDivisionError"), (takes_all, "MemoryError"), (never_ends, "hang")):
        monkeypatch.setattr(fuzz_documents, "CliRunner", lambda action=action: Broken(action))
        assert expected in run_alone(kind, tmp_path / "report", 1, 1 << 28)


def test_a_document_is_changed_the_same_way_by_the_same_seed(tmp_path: Path) -> None:
    kind = Kind(tmp_path / "x", {"a": [1, {"b": "c"}], "d": 4}, ())
    texts = [fuzz_documents.changed_text(kind, Random(f"3 {number}")) for number in range(50)]
    assert texts == [fuzz_documents.changed_text(kind, Random(f"3 {number}")) for number in range(50)]
    assert len(set(texts)) > 30
