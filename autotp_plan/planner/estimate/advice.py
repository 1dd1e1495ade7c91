"""By which TP size, ZeRO stage and micro-batch a model is trained: what fits, the fastest first.

Every way is tried by arithmetic on a few small steps (`extrapolate`). What is advised is then estimated in full, so
that it says what `autotp-plan estimate` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from autotp_plan.planner.estimate.extrapolate import SmallCases, SmallSteps, small_cases, whole_step, whole_traffic
from autotp_plan.planner.estimate.from_plan import elements_of_rank, estimate_from_plan
from autotp_plan.planner.estimate.memory import Held, held, held_all_the_time
from autotp_plan.planner.estimate.step_time import Cluster, StepTime, step_time
from autotp_plan.schemas.errors import CheckpointError, CompileError, MismatchError
from autotp_plan.schemas.estimate.document import Estimate, RankEstimate
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.estimate.step import Step, StepCase
from autotp_plan.schemas.plan.document import Plan

MOST_SEQUENCES = 64
"""In a micro-batch."""
_MOST_TRIED = 8
"""Ways that are estimated in full, where the first ones do not fit."""
RECOMPUTED = (None, "full")
"""Kinds of activation checkpointing that are tried."""
RunSteps = Callable[[Sequence[StepCase]], list[Step]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a model is to be trained on.

    Attributes:
        cluster: the GPUs.
        memory: bytes of a GPU that may be used.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step, over all ranks.
    """

    cluster: Cluster
    memory: int
    seq_length: int
    global_batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to train.

    Attributes:
        tp_size: number of tensor-parallel ranks.
        settings: the rest.
        peak: bytes that the fullest rank holds at most; without the model's code those of its states alone.
        time: of a step; None where the model's code was not run.
        estimate: by a run of DeepSpeed's engine, of what is advised.
    """

    tp_size: int
    settings: Settings
    peak: int
    time: StepTime | None = None
    estimate: Estimate | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What fits, and what does not.

    Attributes:
        fits: the fastest first; of a TP size, stage and activation checkpointing the best micro-batch.
        too_large: what does not fit, with one sequence at a time; what lacks least first.
        chosen: the first of what fits, estimated in full.
        dropped: what seemed to fit, and does not when it is estimated in full.
    """

    fits: tuple[Way, ...]
    too_large: tuple[Way, ...]
    chosen: tuple[Way, ...] = ()
    dropped: tuple[Way, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharded:
    """A model at a TP size.

    Attributes:
        plan: of it.
        rank: the TP rank that holds most.
        elements: that it holds.
        steps: small steps, by the kind of activation checkpointing; none where the model's code is not run.
    """

    plan: Plan
    rank: int
    elements: int
    steps: Mapping[str | None, SmallSteps] = dataclasses.field(default_factory=dict)


def sharded(plan: Plan) -> Sharded:
    """A plan with its fullest rank."""
    elements = [elements_of_rank(plan, rank) for rank in range(plan.tp_size)]
    return Sharded(plan=plan, rank=elements.index(max(elements)), elements=max(elements))


def dp_size_of(tp_size: int, wanted: Wanted) -> int:
    """Number of data-parallel ranks."""
    return wanted.cluster.gpus // tp_size


def with_steps(given: Sequence[Sharded], length: int, run: RunSteps) -> list[Sharded]:
    """The same with small steps, of those with and of those without activation checkpointing.

    Args:
        given: models at TP sizes.
        length: tokens of a sequence.
        run: runs them: `autotp_plan.runtime.estimate.small_steps.run_small_steps`.
    """

    def cases(all_layers: bool) -> list[tuple[Sharded, str | None, SmallCases]]:
        return [
            (one, again, small_cases(one.plan, one.rank, length, again, all_layers))
            for one in given
            for again in RECOMPUTED
        ]

    wanted = cases(all_layers=False)
    try:
        steps = iter(run([case for _, _, small in wanted for case in small.cases]))
    except (MismatchError, CheckpointError, CompileError):  # the config of fewer layers may be of no model
        wanted = cases(all_layers=True)
        steps = iter(run([case for _, _, small in wanted for case in small.cases]))
    found: dict[int, dict[str | None, SmallSteps]] = {}
    for one, again, small in wanted:
        found.setdefault(one.plan.tp_size, {})[again] = small.of([next(steps) for _ in small.cases])
    return [dataclasses.replace(one, steps=found[one.plan.tp_size]) for one in given]


def may_fit(one: Sharded, wanted: Wanted) -> bool:
    """Whether weights and states leave room for anything, at the stage of ZeRO that divides most."""
    dp_size = dp_size_of(one.plan.tp_size, wanted)
    stage = 3 if dp_size > 1 else 0
    return held_all_the_time(one.elements, Settings(dp_size=dp_size, zero_stage=stage)) < wanted.memory


def ways(given: Iterable[Sharded], wanted: Wanted) -> Advice:
    """What fits and what does not, of all ways.

    Args:
        given: the model at each TP size; one without steps is judged by its states alone.
        wanted: what it is to be trained on.
    """
    fits: list[Way] = []
    too_large: list[Way] = []
    for one in given:
        dp_size = dp_size_of(one.plan.tp_size, wanted)
        for stage in range(4) if dp_size > 1 else [0]:
            for again in one.steps or [None]:
                tried = [way_of(one, settings, wanted) for settings in _batches(dp_size, stage, again, wanted, one)]
                fitting = [way for way in tried if way.peak <= wanted.memory]
                if fitting:
                    fits.append(min(fitting, key=_seconds))
                else:
                    too_large.append(tried[0])
    return Advice(
        fits=tuple(sorted(fits, key=lambda way: (_seconds(way), way.peak))),
        too_large=tuple(sorted(too_large, key=lambda way: way.peak)),
    )


def _batches(dp_size: int, stage: int, again: str | None, wanted: Wanted, one: Sharded) -> Iterable[Settings]:
    """Settings with micro-batches of 1, 2, 4, ... sequences that the global batch is a multiple of."""
    sequences = 1
    while sequences == 1 or (one.steps and sequences <= MOST_SEQUENCES):
        steps, rest = divmod(wanted.global_batch_size, dp_size * sequences)
        if rest:
            break
        yield Settings(
            dp_size=dp_size,
            zero_stage=stage,
            micro_batch_size=sequences,
            seq_length=wanted.seq_length,
            gradient_accumulation_steps=steps,
        ).recomputing(again)
        sequences *= 2


def way_of(one: Sharded, settings: Settings, wanted: Wanted) -> Way:
    """A way to train, by arithmetic."""
    tp_size = one.plan.tp_size
    if not one.steps:
        return Way(tp_size=tp_size, settings=settings, peak=estimate_from_plan(one.plan, settings).fullest.peak)
    step = whole_step(one.steps[settings.recomputed], settings.micro_batch_size)
    passes = settings.gradient_accumulation_steps
    traffic = [
        dataclasses.replace(sent, count=passes * sent.count, bytes=passes * sent.bytes)
        for sent in whole_traffic(one.steps[settings.recomputed], settings.micro_batch_size)
    ]
    operations = passes * (step.forward_operations + step.backward_operations)
    of_states = estimate_from_plan(one.plan, settings).ranks[0].traffic
    return Way(
        tp_size=tp_size,
        settings=settings,
        peak=held_of(one, settings).peak,
        time=step_time(wanted.cluster, tp_size, settings, operations, [*traffic, *of_states], one.elements),
    )


def held_of(one: Sharded, settings: Settings) -> Held:
    """What the fullest rank of a model with small steps holds."""
    step = whole_step(one.steps[settings.recomputed], settings.micro_batch_size)
    return held(step, one.elements, settings)


def confirmed(
    found: Advice,
    given: Mapping[int, Sharded],
    wanted: Wanted,
    run: Callable[[Plan, Settings], Estimate],
    number: int = 3,
    progress: Callable[[Way], None] = lambda _: None,
) -> Advice:
    """The advice with the first ways of what fits, estimated in full; those that do not fit after all are dropped.

    Args:
        found: by `ways`.
        given: the model by TP size.
        wanted: as for `ways`.
        run: estimates in full: `autotp_plan.runtime.estimate.run.estimate_by_running`.
        number: how many ways are chosen.
        progress: called with each way before it is run.
    """
    listed, dropped = list(found.fits), []
    for _ in range(_MOST_TRIED):
        way = next((one for one in listed[:number] if one.estimate is None), None)
        if way is None:
            break
        progress(way)
        estimate = run(given[way.tp_size].plan, way.settings)
        full = dataclasses.replace(
            way,
            peak=estimate.fullest.peak,
            estimate=estimate,
            time=max((_time_of_rank(one, way, given, wanted) for one in estimate.ranks), key=lambda time: time.total),
        )
        listed.remove(way)
        if full.peak <= wanted.memory:
            listed = sorted([*listed, full], key=_seconds)  # a time in full may be longer: the next one is tried
        else:
            dropped.append(full)
    chosen = [way for way in listed if way.estimate is not None][:number]
    return dataclasses.replace(found, fits=tuple(listed), chosen=tuple(chosen), dropped=tuple(dropped))


def _time_of_rank(rank: RankEstimate, way: Way, given: Mapping[int, Sharded], wanted: Wanted) -> StepTime:
    operations = rank.forward_operations + rank.backward_operations
    elements = given[way.tp_size].elements
    return step_time(wanted.cluster, way.tp_size, way.settings, operations, rank.traffic, elements)


def _seconds(way: Way) -> float:
    return way.time.total if way.time is not None else float(way.tp_size)
