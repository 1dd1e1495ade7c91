"""Sequence parallelism of a plan in a sentence, and as JSON: which layers, and what is sent at which modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autotp_plan.schemas.names import some
from autotp_plan.schemas.plan.document import Plan, SequenceParallel
from autotp_plan.schemas.plan.stream_places import Modules, layers_of_style, names_of

_MOST_NAMES = 12
"""In one part of a sentence."""


def stream_words(plan: Plan) -> str | None:
    """`sequence parallel: the stream of 32 layers is sharded; all-gather before mlp, self_attn; ...`.

    Returns:
        a sentence; None for a plan whose ranks all hold every token, and that was not asked for anything else.
    """
    planned = plan.sequence_parallel
    if planned is None:
        asked = plan.rules is not None and plan.rules.sequence_parallel
        return "sequence parallel: not at TP=1, where the one rank holds every token" if asked else None
    layers = names_of(planned.layers)
    rows = layers_of_style(plan, "row")
    scatter = names_of(planned.scatter)
    summed = [name for name in scatter if name in rows]
    taken = [name for name in scatter if name not in rows]
    parts = [
        f"the stream of {len(layers)} layer{'s' if len(layers) > 1 else ''} is sharded",
        _part("all-gather before", names_of(planned.gather), layers),
        _part("reduce-scatter behind", summed, layers),
        _part("each rank takes its tokens behind", taken, layers),
        f"all-gather behind {planned.end}",
    ]
    return f"sequence parallel: {'; '.join(part for part in parts if part)}"


def stream_json(planned: SequenceParallel) -> dict[str, Any]:
    """The section with every name written out."""
    lists = {"layers": planned.layers, "gather": planned.gather, "scatter": planned.scatter}
    return {**{key: names_of(patterns) for key, patterns in lists.items()}, "end": planned.end}


def _part(what: str, names: Iterable[str], layers: Iterable[str]) -> str:
    """What happens at modules, each called as its layer calls it."""
    known = Modules(layers)
    leaves = dict.fromkeys(name.removeprefix(f"{known.holding(name)}.") for name in names)
    return f"{what} {some(list(leaves), _MOST_NAMES)}" if leaves else ""
