"""The checks of `make gpu`, on CPU: they run, they notice what is wrong, and what they found is read back."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import chosen
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.record import Outcome, Record, Run, State
from benchmarks.gpu.report import page
from benchmarks.gpu.supervise import run_checks, together
from benchmarks.gpu.work import Check, Error, Found, absolute, relative
from tests.helpers.paths import ROOT
from tests.helpers.programs import output_of, started

COMMAND = ["python", "-m", "benchmarks.gpu", "--device", "cpu"]
RECORD = Record.from_json((ROOT / "docs" / "gpu.json").read_text(encoding="utf-8"))


def nothing(_: Any) -> Found:
    return Found()


def check(name: str = "a check", **changes: Any) -> Check:
    return Check(name=name, function=nothing, topic="A topic", **{"limit": 1e-5, **changes})


def found(**changes: Any) -> dict[str, Any]:
    """What a rank writes down of a check."""
    return {"worst": 0.0, "planted": 1.0, "figures": {}, "absent": "", "error": "", "seconds": 1.0, **changes}


def run(card: str | None, date: str, *outcomes: Outcome) -> Run:
    return Run(date=date, card=card, versions={"torch": "2"}, seconds=1.0, outcomes=outcomes)


def outcome(name: str, state: State = State.PASSED, **changes: Any) -> Outcome:
    return Outcome(name=name, topic="A topic", state=state, **changes)


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_the_small_mode(tmp_path: Path) -> None:
    output_of([*COMMAND, "--small", "--output", tmp_path], timeout=250)
    record = Record.from_json((tmp_path / "gpu.json").read_text())
    (small,) = record.runs
    assert [one.name for one in small.outcomes] == [one.name for one in chosen(None, True, "cpu")]
    assert small.card is None and not small.failed
    assert page(record) == (tmp_path / "gpu.md").read_text()
    for one in small.outcomes:
        assert one.state in (State.PASSED, State.MEASURED, State.ABSENT), one
        if one.state is State.PASSED:
            assert one.limit is not None and one.worst is not None and one.planted is not None
            assert one.worst <= one.limit < one.planted, one
        assert "did not run" not in one.figures, one


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_gradient_that_is_wrong_is_an_error() -> None:
    with started([*COMMAND, "--plant", "--only", "one rank, float32 qwen3"]) as program:
        said, _ = program.communicate(timeout=110)
    assert program.returncode == 1, said
    assert "1 of 1 checks failed: one rank, float32 qwen3" in said


def test_every_kind_of_check_is_in_the_small_mode() -> None:
    """A function that CI does not call breaks before a card is there."""

    def function(one: Check) -> Any:
        return getattr(one.function, "func", one.function)

    small = {function(one) for one in chosen(None, True, "cpu")}
    left_out = {function(one).__name__ for one in CHECKS if not one.needs_cuda} - {one.__name__ for one in small}
    assert left_out == LEFT_OUT


LEFT_OUT = {
    "overlap", "bf16", "trainer", "hybrid", "hybrid_kernels", "compiled", "unknown_token",
}  # fmt: skip
"""They ran on a card before, and other tests call what they call."""


def test_names_are_of_one_check() -> None:
    names = [one.name for one in CHECKS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([{}, {}], State.PASSED),
        ([{}, {"worst": 2e-5}], State.FAILED),
        ([{"worst": math.nan}, {}], State.FAILED),
        ([{}, {"worst": math.nan}], State.FAILED),
        ([{}, {"planted": 1e-6}], State.FAILED),
        ([{"planted": None}, {"planted": None}], State.FAILED),
        ([{}, {"error": "Traceback"}], State.FAILED),
        ([{"worst": None}, {"worst": None}], State.MEASURED),
        ([{"worst": None, "absent": "a kernel"}] * 2, State.ABSENT),
    ],
)
def test_what_becomes_of_a_check(ranks: list[dict[str, Any]], expected: State) -> None:
    assert together(check(), [found(**one) for one in ranks]).state is expected


def test_a_planted_error_is_one_of_the_number() -> None:
    error = relative([1.0, 2.0], [1.0, 2.0])
    assert error.worst == 0.0 and error.planted == pytest.approx(0.01)


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_a_number_is_an_error(place: int) -> None:
    numbers = [1.0, 1.0]
    numbers[place] = math.nan
    of_tensors = absolute(*({"a": torch.tensor(one), "b": torch.ones(1)} for one in (numbers, [1.0, 1.0])))
    for error in (relative(numbers, [1.0, 1.0]), of_tensors, Error.of_all([Error(worst=0.0, planted=1.0), of_tensors])):
        one = together(check(), [found(), found(worst=error.worst, planted=error.planted, figures={"loss": math.nan})])
        assert one.state is State.FAILED and "not a finite number" in one.reason
        assert Record.from_json(Record().with_run(run("H100", "2026-01-01", one)).to_json()).runs[0].failed


def test_what_does_not_fit_the_time_is_not_run(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    run_checks(tmp_path, {}, [check("first"), check("second", ranks=0)], time.monotonic(), outcomes.append)
    assert [(one.name, one.state) for one in outcomes] == [("first", State.NO_TIME), ("second", State.NO_TIME)]


def test_a_check_that_hangs_or_dies_costs_no_other(tmp_path: Path) -> None:
    names = ["first", "raises", "second", "hangs", "third", "one rank hangs", "dies", "card", "fourth"]
    checks = [check(name, seconds=0.5 if "hangs" in name else 20, spoils=name == "card") for name in names]
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60
    run_checks(tmp_path, {"device": "cuda"}, checks, deadline, outcomes.append, "tests.helpers.checked_rank")
    by_name = {one.name: one for one in outcomes}
    assert list(by_name) == names
    assert [one.name for one in outcomes if one.state is not State.PASSED] == [
        "raises", "hangs", "one rank hangs", "dies",
    ]  # fmt: skip
    assert by_name["raises"].reason == "it raised" and "rank 1 ended\nit died" in by_name["dies"].reason
    assert "longer than 0 s" in by_name["hangs"].reason or "longer than 1 s" in by_name["hangs"].reason
    processes = [one.figures["process"] for one in outcomes if one.state is State.PASSED]
    assert len(set(processes)) == len(processes)  # each of them is the first of new ranks
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_has_begun_when_the_time_is_over_is_not_run(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 1.0
    checks = [check("first", seconds=20), check("hangs", seconds=20), check("second")]
    run_checks(tmp_path, {"device": "cuda"}, checks, deadline, outcomes.append, "tests.helpers.checked_rank")
    assert [one.state for one in outcomes] == [State.PASSED, State.NO_TIME, State.NO_TIME]
    assert time.monotonic() - deadline < 2


def test_the_record_is_read_back() -> None:
    assert Record.from_json(RECORD.to_json()) == RECORD
    with pytest.raises(TypeError, match="unknown"):
        Outcome.from_dict({"unknown": 1, **dataclasses.asdict(outcome("a"))})
    with pytest.raises(ValueError, match="version 2"):
        Record.from_json(RECORD.to_json().replace('"version": 1', '"version": 2', 1))


def test_the_page_is_made_of_the_record() -> None:
    written = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert written == page(RECORD), "run `python -m benchmarks.gpu --again`"


def test_a_run_on_a_card_is_never_dropped() -> None:
    record = Record()
    record = record.with_run(run("H200", "2026-01-01", outcome("a", worst=1e-7), outcome("b", worst=1e-8)))
    record = record.with_run(run(None, "2026-01-02", outcome("c", worst=3e-7)))
    record = record.with_run(run("H100", "2026-01-03", outcome("a", worst=2e-7), outcome("b", State.NO_TIME)))
    record = record.with_run(run(None, "2026-01-04", outcome("c", worst=4e-7), outcome("a", worst=5e-7)))
    assert [(one.card, one.date[-1]) for one in record.runs] == [(None, "4"), ("H100", "3"), ("H200", "1")]
    text = page(record)
    never, _, on_card = text.partition("## A topic")
    assert "| c | passed, 2026-01-04 | 4.0e-07 |" in never and "| c |" not in on_card
    assert "| a | 2.0e-07 |" in on_card and "H100, 2026-01-03 |" in on_card
    assert "| b | 1.0e-08 |" in on_card and "H200, 2026-01-01 |" in on_card
    assert "5.0e-07" not in text


def test_figures_of_the_first_card_are_kept() -> None:
    (first,) = [one for one in RECORD.runs if (one.card, one.date) == ("NVIDIA H200", "2026-11-26")]
    assert len(first.outcomes) == 63
    assert {one.name for one in first.outcomes} <= {one.name for one in CHECKS}
    (loading,) = [one for one in first.outcomes if one.name == "large loading"]
    assert loading.figures["shards, s"] == 2.005
