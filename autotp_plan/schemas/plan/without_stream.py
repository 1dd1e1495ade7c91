"""A plan without its sharded stream, and whether two plans differ in that alone.

Sequence parallelism changes what ranks send, and not what they hold: shards and saved jobs of the one plan are the
other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.entries import Parameter, PlanEntries
from autotp_plan.schemas.plan.stream_places import Stream

_Plan = TypeVar("_Plan", bound=PlanEntries)


def without_stream(plan: _Plan) -> _Plan:
    """The plan by which every rank holds all tokens.

    Args:
        plan: a sound plan; one without sequence parallelism stays as it is.

    Returns:
        The plan, without the sums of gradients over parts of the tokens.
    """
    stream = Stream.of(plan)
    if stream is None:
        return plan
    parts = {
        name
        for entry in plan.parameters
        if entry.partial_gradient and not entry.add_once
        for name in expand(entry.name)
        if stream.sees_a_part(name.rpartition(".")[0])
    }
    parameters = tuple(with_partial_gradients(plan.parameters, parts, partial=False))
    return dataclasses.replace(plan, parameters=parameters, sequence_parallel=None)


def differ_in_stream_alone(one: PlanEntries, other: PlanEntries) -> bool:
    """Whether two plans, one or both with a sharded stream, are the same without it.

    Args:
        one: a sound plan.
        other: another one.
    """
    if one.sequence_parallel == other.sequence_parallel or one.tp_size != other.tp_size:
        return False
    return _written_out(one) == _written_out(other)


def _written_out(plan: PlanEntries) -> PlanEntries:
    """All that a plan without its stream says of what ranks hold and compute, whatever its entries are folded to."""
    rest = without_stream(plan)
    return dataclasses.replace(
        PlanEntries(**{one.name: getattr(rest, one.name) for one in dataclasses.fields(PlanEntries)}),
        model=dataclasses.replace(rest.model, repository=None),
        parameters=tuple(sorted(rest.expanded(), key=lambda parameter: parameter.name)),
        notes=(),
        rules=None,
        verified=None,
    )


def with_partial_gradients(
    entries: Iterable[Parameter], names: Collection[str], partial: bool = True
) -> Iterator[Parameter]:
    """The entries of a plan, those of `names` marked, or unmarked; an entry of both kinds becomes single ones."""
    for entry in entries:
        listed = expand(entry.name)
        inside = sum(name in names for name in listed)
        if inside in (0, len(listed)):
            yield dataclasses.replace(entry, partial_gradient=partial) if inside else entry
            continue
        one = [None] * len(listed) if entry.source is None else expand(entry.source)
        many = [None] * len(listed) if entry.sources is None else list(entry.sources.expanded())
        for name, source, sources in zip(listed, one, many):
            marked = partial if name in names else entry.partial_gradient
            yield dataclasses.replace(entry, name=name, source=source, sources=sources, partial_gradient=marked)
