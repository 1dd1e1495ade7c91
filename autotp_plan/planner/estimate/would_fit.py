"""What would make a model fit that does not: more GPUs, optimizer states on the host, or shorter sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from autotp_plan.planner.estimate.advice import (
    RunSteps,
    Sharded,
    Wanted,
    Way,
    dp_size_of,
    way_of,
    ways,
    with_steps,
)
from autotp_plan.planner.estimate.memory import bytes_stepped
from autotp_plan.schemas.estimate.settings import Settings

_TIMES_AS_MANY = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SHORTEST = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Would:
    """A change with which a model fits.

    Attributes:
        what: `gpus`, `offload` or `seq_length`.
        number: how many GPUs; bytes in the host's memory for each GPU; tokens of a sequence.
        way: how the model is trained then.
    """

    what: str
    number: int
    way: Way


def what_would_fit(
    given: Sequence[Sharded], wanted: Wanted, run: RunSteps | None, further: Sequence[Sharded] = ()
) -> list[Would]:
    """What would make a model fit that does not.

    Args:
        given: the model at each TP size that its GPUs allow.
        wanted: what it does not fit.
        run: runs small steps; None where the model's code is not to be run. Then states alone are judged.
        further: the model at larger TP sizes, which more GPUs would allow.
    """
    if run is not None and not any(one.steps for one in given):
        largest = max(given, key=lambda one: one.plan.tp_size)
        given = with_steps([largest], wanted.seq_length, run)
    elif run is not None:
        given = [one for one in given if one.steps]
    if run is not None and further:
        further = with_steps(further, wanted.seq_length, run)
    found = [_more_gpus([*given, *further], wanted), _offloaded(given, wanted)]
    if run is not None:
        found.append(_shorter(given, wanted, run))
    return [one for one in found if one is not None]


def _more_gpus(given: Sequence[Sharded], wanted: Wanted) -> Would | None:
    for times in _TIMES_AS_MANY:
        gpus = times * wanted.cluster.gpus
        more = dataclasses.replace(
            wanted,
            cluster=dataclasses.replace(wanted.cluster, gpus=gpus),
            global_batch_size=times * wanted.global_batch_size,
        )
        fits = ways((one for one in given if gpus % one.plan.tp_size == 0), more).fits
        if fits:
            return Would(what="gpus", number=gpus, way=fits[0])
    return None


def _offloaded(given: Sequence[Sharded], wanted: Wanted) -> Would | None:
    found = []
    for one in given:
        dp_size = dp_size_of(one.plan.tp_size, wanted)
        for stage in (1, 2, 3):
            for again in one.steps or [None]:
                settings = Settings(
                    dp_size=dp_size,
                    zero_stage=stage,
                    seq_length=wanted.seq_length,
                    gradient_accumulation_steps=wanted.global_batch_size // dp_size,
                    offload="optimizer",
                ).recomputing(again)
                way = way_of(one, settings, wanted)
                if way.peak <= wanted.memory:
                    found.append(
                        Would(what="offload", number=-(-one.elements // dp_size) * bytes_stepped(settings), way=way)
                    )
    return min(found, key=lambda would: would.way.time.total if would.way.time else would.way.tp_size, default=None)


def _shorter(given: Sequence[Sharded], wanted: Wanted, run: RunSteps) -> Would | None:
    """The longest of halves, quarters, ... of the sequence, at the TP size that lacks least."""
    best = ways(given, wanted).too_large[0]
    (one,) = (one for one in given if one.plan.tp_size == best.tp_size)
    length = wanted.seq_length // 2
    nothing = dataclasses.replace(best.settings, seq_length=1)
    least = way_of(dataclasses.replace(one, steps={}), nothing, wanted).peak
    while length >= _SHORTEST and least <= wanted.memory:
        shorter = dataclasses.replace(wanted, seq_length=length)
        fits = ways(with_steps([one], length, run), shorter).fits
        if fits:
            return Would(what="seq_length", number=length, way=fits[0])
        length //= 2
    return None
