"""docs/gpu.json: what the checks on a GPU found, by run. A run on a card is never dropped from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

FORMAT = "autotp-plan-gpu"
VERSION = 1


class State(str, Enum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    MEASURED = "measured"  # nothing was compared
    ABSENT = "not available"
    NO_TIME = "not run: time"

    @property
    def has_run(self) -> bool:
        """Whether there is a result."""
        return self in (State.PASSED, State.FAILED, State.MEASURED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One check of one run.

    Args:
        name: the check.
        topic: what it is about.
        state: what became of it.
        worst: its largest error.
        limit: the largest error that is right.
        planted: the error that the comparison found when one number was made wrong; above the limit.
        figures: other figures by name.
        seconds: how long it took.
        reason: why it failed, or what this machine does not have.
    """

    name: str
    topic: str
    state: State
    worst: float | None = None
    limit: float | None = None
    planted: float | None = None
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        return cls(**{**data, "state": State(data["state"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run of the checks on one machine.

    Args:
        date: year-month-day.
        card: the name of the GPU; None for the CPU.
        memory: gibibytes of the card.
        versions: of torch, CUDA and what else is installed, by name.
        seconds: of the whole run.
        note: what else must be known of the run.
        outcomes: in the order in which the checks ran.
    """

    date: str
    card: str | None
    memory: float | None = None
    versions: Mapping[str, str]
    seconds: float
    note: str = ""
    outcomes: tuple[Outcome, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Run:
        return cls(**{**data, "outcomes": tuple(Outcome.from_dict(one) for one in data["outcomes"])})

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(one for one in self.outcomes if one.state is State.FAILED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The runs, the newest first."""

    runs: tuple[Run, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> Record:
        data = json.loads(text)
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ValueError(f"not {FORMAT} of version {VERSION}, but {data['format']} of version {data['version']}")
        return cls(runs=tuple(Run.from_dict(run) for run in data["runs"]))

    def to_json(self) -> str:
        runs = [dataclasses.asdict(run) for run in self.runs]
        return json.dumps({"format": FORMAT, "version": VERSION, "runs": runs}, indent=1, allow_nan=False) + "\n"

    def with_run(self, run: Run) -> Record:
        """With a new run, in the place of earlier ones on a CPU if it is one."""
        kept = (old for old in self.runs if run.card is not None or old.card is not None)
        return Record(runs=(run, *kept))

    def latest(self, name: str, *, on_card: bool) -> tuple[Run, Outcome] | None:
        """The newest result of a check, on a card or on a CPU; None where it never ran."""
        for run in self.runs:
            for one in run.outcomes:
                if one.name == name and one.state.has_run and (run.card is not None) == on_card:
                    return run, one
        return None

    def names(self) -> list[tuple[str, str]]:
        """Topic and name of every check, in the order of the newest run that has it, topic after topic."""
        topics: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for one in run.outcomes:
                if not any(one.name in names for names in topics.values()):
                    topics.setdefault(one.topic, {})[one.name] = None
        return [(topic, name) for topic, names in topics.items() for name in names]
