"""Starts the ranks that run the checks, and stops them: a check that hangs or dies costs no other check.

The ranks say in a file what they begin and what they found. When one fails or takes too long they are all killed, and
new ones go on with the next check. It knows no check.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Outcome, State
from benchmarks.gpu.work import Check, largest

START_SECONDS = 120
"""For imports and the process group."""
_POLL_SECONDS = 0.05
_OUTPUT = 3000
Report = Callable[[Outcome], None]


def run_checks(
    work: Path,
    job: dict[str, Any],
    checks: Sequence[Check],
    deadline: float,
    report: Report,
    program: str = "benchmarks.gpu.rank",
) -> None:
    """Run checks in their order, those in a row that take the same ranks in the same processes.

    Args:
        work: a folder that the ranks share.
        job: what they are told, for `benchmarks.gpu.rank`.
        checks: the most important first.
        deadline: by `time.monotonic()`; checks that have not ended then are reported as not run.
        report: called with each outcome.
        program: the module that a rank runs.
    """
    for number, (ranks, of_group) in enumerate(itertools.groupby(checks, key=lambda check: check.ranks)):
        left = list(of_group)
        for attempt in itertools.count():
            if not left:
                break
            if time.monotonic() >= deadline:
                for check in left:
                    report(Outcome(name=check.name, topic=check.topic, state=State.NO_TIME))
                break
            folder = work / f"ranks-{number}-{attempt}"
            folder.mkdir()
            told = {**job, "work": str(work), "checks": [check.name for check in left]}
            with _Ranks(folder, told, ranks, program) as group:
                while left and group.is_sound:
                    check = left.pop(0)
                    outcome = group.wait(check, deadline)
                    report(outcome)
                    if check.spoils and outcome.state.has_run and job["device"] == "cuda":
                        break


class _Ranks:
    """Processes that run checks one after the other."""

    def __init__(self, folder: Path, job: dict[str, Any], ranks: int, program: str) -> None:
        self.is_sound = True
        self._folder = folder
        (folder / "job.json").write_text(json.dumps(job))
        self._processes = []
        for rank in range(max(1, ranks)):
            # LOCAL_RANK names the device: it is the same for all
            of_rank = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            with (folder / f"output-{rank}").open("w") as output:
                command = [sys.executable, "-m", program, str(folder)]
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **(of_rank if ranks else {})},
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        self._started = time.monotonic()
        self._begun = False

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()

    def wait(self, check: Check, deadline: float) -> Outcome:
        """The outcome of the check that the ranks come to next."""
        began = time.monotonic()
        while True:
            found = [self._found(rank, check.name) for rank in range(len(self._processes))]
            if all(found):
                outcome = together(check, [one for one in found if one])
                self.is_sound = not any(one["error"] for one in found if one)
                return outcome
            now = time.monotonic()
            if not self._begun and (self._folder / "begun").exists():
                self._begun, began = True, now
            end = began + check.seconds if self._begun else self._started + START_SECONDS
            raised = next((one["error"] for one in found if one and one["error"]), "")
            died = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
            if now >= deadline and not (raised or died):
                self.is_sound = False
                return Outcome(name=check.name, topic=check.topic, state=State.NO_TIME, seconds=now - began)
            if raised or died or now >= end:
                self.is_sound = False
                reason = raised or f"it took longer than {end - began:.0f} s\n{self._said(0)}"
                if died and not raised:
                    reason = f"rank {died[0]} ended\n{self._said(died[0])}"
                return Outcome(
                    name=check.name, topic=check.topic, state=State.FAILED, seconds=now - began, reason=reason
                )
            time.sleep(_POLL_SECONDS)

    def _found(self, rank: int, name: str) -> dict[str, Any] | None:
        """What a rank has found in a check, once it has."""
        path = self._folder / f"found-{rank}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n") and (one := json.loads(line))["name"] == name:
                return dict(one)
        return None

    def _said(self, rank: int) -> str:
        return (self._folder / f"output-{rank}").read_text()[-_OUTPUT:]


def together(check: Check, found: Sequence[dict[str, Any]]) -> Outcome:
    """What the ranks found: the largest error, the smallest that a planted one gave, the first rank's figures."""
    errors = [one["worst"] for one in found if one["worst"] is not None]
    worst = largest(errors) if errors else None
    limit = None if worst is None else check.limit
    planted = min((one["planted"] for one in found if one["planted"] is not None), default=None)
    raised = next((one["error"] for one in found if one["error"]), "")
    absent = next((one["absent"] for one in found if one["absent"]), "")
    state, reason = State.MEASURED if limit is None else State.PASSED, ""
    if raised:
        state, reason = State.FAILED, raised
    elif absent:
        state, reason = State.ABSENT, absent
    elif worst is not None and not math.isfinite(worst):
        state, reason = State.FAILED, "an error is not a finite number"
    elif worst is not None and limit is not None and worst > limit:
        state, reason = State.FAILED, f"the error is {worst:.3g}, above the limit of {limit:.3g}"
    elif limit is not None and (planted is None or not planted > limit):
        state, reason = State.FAILED, f"a planted error was not noticed: it gave {planted}"
    return Outcome(
        name=check.name,
        topic=check.topic,
        state=state,
        worst=worst if worst is not None and math.isfinite(worst) else None,  # JSON has no infinity
        limit=limit,
        planted=planted if planted is not None and math.isfinite(planted) else None,
        figures={name: _finite(value) for name, value in found[0]["figures"].items()},
        seconds=max(one["seconds"] for one in found),
        reason=reason,
    )


def _finite(value: Any) -> Any:
    """A figure for JSON, which has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
