"""An estimate: what each kind of rank holds when it holds most, sends and computes in a step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.plan.document import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is held for one purpose, in bytes."""

    what: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """The collectives of one kind over one group, in a step.

    Attributes:
        operation: `all-reduce`, `all-gather`, `reduce-scatter`, ...
        group: `tensor`, `data`, or `all` ranks.
        count: how many there are.
        bytes: of the tensors that they sum or put together, in all.
    """

    operation: str
    group: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """What a rank takes.

    Attributes:
        tp_ranks: the TP ranks that this is true of: they hold shards of the same shapes.
        peak: the most bytes that a rank holds at a time, on its device.
        when: when that is.
        at_peak: what it is made of; the sum is `peak`.
        phases: the most bytes in each part of the job: `initialize`, `forward`, `backward`, `optimizer step`.
        host: what is held in the memory of the host, because it is offloaded.
        traffic: what is communicated in a step.
        forward_operations: floating-point operations of a step's forwards.
        backward_operations: those of its backwards, recomputation included.
    """

    tp_ranks: tuple[int, ...]
    peak: int
    when: str
    at_peak: tuple[Part, ...]
    phases: tuple[Part, ...] = ()
    host: tuple[Part, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    forward_operations: int = 0
    backward_operations: int = 0

    def __post_init__(self) -> None:
        assert sum(part.bytes for part in self.at_peak) == self.peak, "the parts are the whole"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a training step of a plan takes, by kind of rank.

    Attributes:
        model: the architecture.
        plan: the plan's fingerprint.
        tp_size: number of tensor-parallel ranks.
        settings: how the plan is trained.
        measured: whether the model's own code was run, on tensors without data; else the plan alone was read.
        missing: what the estimate does not have, and the peak is larger by.
        ranks: by the lowest of their TP ranks.
    """

    model: str
    plan: str
    tp_size: int
    settings: Settings
    measured: bool
    missing: tuple[str, ...]
    ranks: tuple[RankEstimate, ...]

    @property
    def fullest(self) -> RankEstimate:
        """The kind of rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.peak)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; all sizes are bytes."""
        document = dataclasses.asdict(self)
        tp_size = document.pop("tp_size")
        return {**document, "settings": {"tp_size": tp_size, **document["settings"]}}


def kinds_of_ranks(plan: Plan) -> list[tuple[int, ...]]:
    """The TP ranks in groups whose shards have the same shapes, by their lowest."""
    kinds: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for rank in range(plan.tp_size):
        kinds[tuple(layout.rank_shape(rank) for layout in plan.layouts.values())].append(rank)
    return [tuple(ranks) for ranks in kinds.values()]
