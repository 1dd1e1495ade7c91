"""The step of a model with all its layers and any batch, from steps of its first layers and small batches.

Every layer that repeats keeps, computes and sends the same, and all of it grows with the number of sequences by equal
amounts: three small steps say the rest.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotp_plan.planner.estimate.fewer_layers import of_first_layers, repeating
from autotp_plan.schemas.estimate.document import Traffic
from autotp_plan.schemas.estimate.step import Step, StepCase
from autotp_plan.schemas.plan.document import Plan

_OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
"""What torch.distributed's operators do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallSteps:
    """Steps of the first layers of a model.

    Attributes:
        less: of one sequence and a number of layers that ends with a full period of them.
        more: of one sequence and one period of layers more.
        more_of_two: of two sequences, with the layers of `more`.
        times: how many periods the model has beyond the layers of `less`; 1 where `more` is all of it.
    """

    less: Step | None
    more: Step
    more_of_two: Step
    times: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallCases:
    """What is to be run for `SmallSteps`: `cases` in the order in which `of` takes their steps."""

    cases: tuple[StepCase, ...]
    times: int

    def of(self, steps: Sequence[Step]) -> SmallSteps:
        """What was run."""
        *less, more, more_of_two = steps
        return SmallSteps(less=less[0] if less else None, more=more, more_of_two=more_of_two, times=self.times)


def small_cases(
    plan: Plan, rank: int, length: int, activation_checkpointing: str | None, all_layers: bool = False
) -> SmallCases:
    """What is to be run to know the step of a plan: of a few layers where they repeat, else of all.

    Args:
        plan: of a transformers model.
        rank: TP rank.
        length: tokens of a sequence.
        activation_checkpointing: which kind: `full`, `selective` or None.
        all_layers: run all of them in any case.
    """

    def case(of: Plan, sequences: int) -> StepCase:
        return StepCase(
            plan=of,
            tp_rank=rank,
            sequences=sequences,
            length=length,
            activation_checkpointing=activation_checkpointing,
        )

    layers = None if all_layers else repeating(plan)
    if layers is None:
        return SmallCases(cases=(case(plan, 1), case(plan, 2)), times=1)
    less = of_first_layers(plan, layers.fewer + layers.period)
    more = of_first_layers(plan, layers.fewer + 2 * layers.period)
    return SmallCases(cases=(case(less, 1), case(more, 1), case(more, 2)), times=layers.times - 1)


def whole_step(small: SmallSteps, sequences: int) -> Step:
    """The step of all layers, without its collectives, which `whole_traffic` has.

    Args:
        small: steps of one sequence and of two.
        sequences: that the rank is given at a time.
    """
    step = _of_batch(small.more, small.more_of_two, sequences)
    if small.less is None:
        return step
    layer = small.more.kept - small.less.kept
    return _of_layers(small.less, small.more, step, layer * sequences, sequences, small.times)


def whole_traffic(small: SmallSteps, sequences: int) -> tuple[Traffic, ...]:
    """What the step of all layers sends over the tensor-parallel ranks. Arguments as for `whole_step`."""
    less, one, two = (_sent(step) for step in (small.less or small.more, small.more, small.more_of_two))
    found = []
    for operation, (count, size) in sorted(one.items()):
        further = count - less[operation][0], size - less[operation][1]
        grown = size + (sequences - 1) * (two[operation][1] - size)
        found.append(
            Traffic(
                operation=_OPERATIONS.get(operation, operation.strip("_")),
                group="tensor",
                count=count + (small.times - 1) * further[0],
                bytes=grown + (small.times - 1) * further[1] * sequences,
            )
        )
    return tuple(found)


def _sent(step: Step) -> dict[str, tuple[int, int]]:
    """Numbers and bytes of the collectives over the tensor-parallel ranks, by operation."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for one in step.collectives:
        if one.group == "tensor":
            count, size = found[one.operation]
            found[one.operation] = (count + one.count, size + one.count * one.tensor_bytes)
    return found


def _of_batch(one: Step, two: Step, sequences: int) -> Step:
    """A step of as many sequences, from those of one and of two."""

    def grown(get: Callable[[Step], int]) -> int:
        return get(one) + (sequences - 1) * (get(two) - get(one))

    return dataclasses.replace(
        one,
        kept=grown(lambda step: step.kept),
        forward_peak=grown(lambda step: step.forward_peak),
        backward=tuple(
            (gradients, alive + (sequences - 1) * (more - alive))
            for (gradients, alive), (_, more) in zip(one.backward, two.backward, strict=True)
        ),
        forward_operations=grown(lambda step: step.forward_operations),
        backward_operations=grown(lambda step: step.backward_operations),
        collectives=(),
    )


def _of_layers(less: Step, more: Step, step: Step, kept: int, sequences: int, times: int) -> Step:
    """A step of all layers, from `step`, which has those of `more`; a period of them keeps `kept` bytes."""

    def grown(get: Callable[[Step], int], scale: int = 1) -> int:
        return get(step) + (times - 1) * scale * (get(more) - get(less))

    return Step(
        parameters=grown(lambda one: one.parameters),
        buffers=grown(lambda one: one.buffers),
        kept=step.kept + (times - 1) * kept,
        forward_peak=step.forward_peak + (times - 1) * kept,
        backward=_timeline(less, step, kept, times),
        forward_operations=grown(lambda one: one.forward_operations, sequences),
        backward_operations=grown(lambda one: one.backward_operations, sequences),
        collectives=(),
    )


def _timeline(less: Step, step: Step, kept: int, times: int) -> tuple[tuple[int, int], ...]:
    """The backward with the gradients of one period of layers repeated: the earlier ones have more kept below them."""
    sizes, fewer = _sizes(step.backward), _sizes(less.backward)
    period = len(sizes) - len(fewer)
    start = next((at for at, (one, other) in enumerate(zip(sizes, fewer)) if one != other), len(fewer))
    start = max(0, start - period)
    alive = [amount for _, amount in step.backward]
    further = [
        (size, amount + above * kept)
        for above in range(times - 1, 0, -1)
        for size, amount in zip(sizes[start : start + period], alive[start : start + period])
    ]
    before = [(size, amount + (times - 1) * kept) for size, amount in zip(sizes[:start], alive[:start])]
    found, total = [], 0
    for size, amount in [*before, *further, *zip(sizes[start:], alive[start:])]:
        total += size
        found.append((total, amount))
    return tuple(found)


def _sizes(backward: tuple[tuple[int, int], ...]) -> list[int]:
    totals = [total for total, _ in backward]
    return [total - before for total, before in zip(totals, [0, *totals])]
