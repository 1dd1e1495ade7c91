"""Where the stream of a plan is sharded along the sequence: what happens at a module, and what sees which tokens.

Looking up a name takes no longer for a deep one, or where there are many.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.entries import PlanEntries


class Modules:
    """Modules of which none is inside of another, by the names of what they hold."""

    def __init__(self, names: Iterable[str]) -> None:
        self._beginnings = sorted(f"{name}." for name in names)

    def holding(self, name: str) -> str | None:
        """The module that `name` is, or that it is inside of."""
        at = bisect_right(self._beginnings, f"{name}.") - 1
        found = at >= 0 and f"{name}.".startswith(self._beginnings[at])
        return self._beginnings[at].removesuffix(".") if found else None

    def inside(self, name: str) -> str | None:
        """The first module that is `name`, or is inside of it."""
        at = bisect_left(self._beginnings, f"{name}.")
        found = at < len(self._beginnings) and self._beginnings[at].startswith(f"{name}.")
        return self._beginnings[at].removesuffix(".") if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A stream that is sharded along the sequence.

    Attributes:
        layers: the layers between which each rank holds its tokens.
        gather: modules that are given every token.
        scatter: modules behind which each rank has its tokens again.
        end: the last module of the stream.
        rows: the row-parallel layers of the plan: the sum over the ranks behind one can be a reduce-scatter.
    """

    layers: Modules
    gather: Modules
    scatter: Modules
    end: Modules
    rows: Collection[str]

    @classmethod
    def of(cls, plan: PlanEntries) -> Stream | None:
        """The stream of a sound plan; None where every rank holds all tokens."""
        planned = plan.sequence_parallel
        if planned is None:
            return None
        lists = (planned.layers, planned.gather, planned.scatter, (planned.end,))
        layers, gather, scatter, end = (Modules(names_of(patterns)) for patterns in lists)
        return cls(layers=layers, gather=gather, scatter=scatter, end=end, rows=layers_of_style(plan, "row"))

    def sees_a_part(self, module: str) -> bool:
        """Whether a module computes with its rank's tokens alone; of a row-parallel layer, with its bias."""
        if self.layers.holding(module) is None and self.end.holding(module) is None:
            return False
        return self.gather.holding(module) is None or module == self.scatter.holding(module) in self.rows


def names_of(patterns: Iterable[str]) -> list[str]:
    """All names that patterns with braces stand for."""
    return [name for pattern in patterns for name in expand(pattern)]


def layers_of_style(plan: PlanEntries, style: str) -> Collection[str]:
    """The modules that hold a parameter of a style."""
    return {name.rpartition(".")[0] for entry in plan.parameters if entry.style == style for name in expand(entry.name)}
