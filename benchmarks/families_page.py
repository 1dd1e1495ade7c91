"""The page of all families: two tables that fit a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.every_family import Outcome

WIDEST = 90
"""Characters of a reason."""


def page(outcomes: Sequence[Outcome], tp_size: int) -> str:
    """The text of docs/families.md."""
    import transformers

    counts = {kind: sum(o.outcome == kind for o in outcomes) for kind in dict.fromkeys(o.outcome for o in outcomes)}
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items(), key=lambda one: -one[1]))
    right = [one for one in outcomes if one.outcome == "right"]
    others = [one for one in outcomes if one.outcome != "right"]
    lines = [
        "# Every causal language model of transformers",
        "",
        f"Written by `python -m benchmarks.every_family --tp {tp_size}` with transformers {transformers.__version__}.",
        f"{len(outcomes)} families: {counted}.",
        "",
        "Each family's config (from `autotp_plan/plans/`, or else the default one) is planned, and the plan is proven",
        "on a small model, as `autotp-plan verify` does. `share` is the fraction of the model's bytes that the largest",
        f"rank holds, `compute` its fraction of a forward's operations (sharded evenly: {1 / tp_size:.2f}), `error`",
        "the largest in float64.",
        "",
        "| family | rules | share | compute | error | replicated |",
        "|---|---|---|---|---|---|",
        *(_right(one) for one in right),
    ]
    if others:
        lines += ["", "| family | outcome | why |", "|---|---|---|", *(_other(one) for one in others)]
    return "\n".join(lines) + "\n"


def _right(one: Outcome) -> str:
    share = "" if one.share is None else f"{one.share:.2f}"
    compute = "" if one.compute is None else f"{one.compute:.2f}"
    error = "" if one.error is None else f"{one.error:.0e}"
    return f"| {one.family} | {one.rules} | {share} | {compute} | {error} | {brief(one.reason)} |"


def _other(one: Outcome) -> str:
    return f"| {one.family} | {one.outcome} | {brief(one.reason)} |"


def brief(text: str) -> str:
    """A reason that fits a table."""
    line = " ".join(text.split()).replace("|", "/").replace("*", "\\*")
    return line if len(line) <= WIDEST else line[: WIDEST - 3] + "..."
