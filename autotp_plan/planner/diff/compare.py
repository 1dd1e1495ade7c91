"""Two plans, and what changed between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from autotp_plan.planner.diff.differences import Difference, Differences, Fact, Side
from autotp_plan.planner.diff.names import compare_facts, compare_names, compare_values
from autotp_plan.planner.diff.plan_facts import (
    Stated,
    attributes,
    fact,
    ignored,
    modules,
    notes,
    parameters,
    stream_places,
    ties,
)
from autotp_plan.planner.plan_table import Summary, computed_in_full, headline, human_bytes, summary, verified_words
from autotp_plan.planner.stream_words import stream_words
from autotp_plan.schemas.codec import encode
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Dequantization, Plan
from autotp_plan.schemas.plan.stamp import Stamp

_FOLDED: tuple[tuple[str, Callable[[Plan], Iterator[Stated]]], ...] = (
    ("parameter", parameters),
    ("tied", ties),
    ("attribute", attributes),
    ("module", modules),
    ("ignored", ignored),
)


def compare_plans(old: Plan, new: Plan) -> Differences:
    """What changed from one plan to another.

    How a plan is written (the order of keys and entries, names of layouts, how layers are folded) is no difference.
    """
    found = [*_settings(old, new), *_model(old, new)]
    for of, stated in _FOLDED:
        found += compare_names(of, stated(old), stated(new))
    found += _stream(old, new)
    found += _inventory(old, new, found)
    found += _totals(old, new)
    found += compare_names("computed in full", _in_full(old), _in_full(new))
    found += _records(old, new)
    return Differences(old=side_of(old), new=side_of(new), found=tuple(found))


def side_of(plan: Plan) -> Side:
    """What the differences say of a plan itself."""
    count = summary(plan).num_parameters
    return Side(headline=headline(plan), num_parameters=count, fingerprint=plan.fingerprint)


def _plain(of: str, name: str, old: Any, new: Any) -> Iterator[Difference]:
    """As `compare_facts`, of JSON values; None is that there is none."""
    sides = (
        None if value is None else fact("value", value, value if isinstance(value, str) else None, "")
        for value in (old, new)
    )
    yield from compare_facts(of, name, *sides)


def _settings(old: Plan, new: Plan) -> Iterator[Difference]:
    yield from _plain("version", "version", old.version, new.version)
    yield from _plain("plan", "tp_size", old.tp_size, new.tp_size)
    yield from _plain("runtime", "runtime.dtype", old.runtime.dtype, new.runtime.dtype)
    overlap = (plan.runtime.tp_overlap_comm or None for plan in (old, new))
    yield from _plain("runtime", "runtime.tp_overlap_comm", *overlap)
    yield from compare_facts("dequantize", "dequantize", *map(dequantize_fact, (old.dequantize, new.dequantize)))


def dequantize_fact(found: Dequantization | None) -> Fact | None:
    """How weights are quantised on disk; None where they are not."""
    return None if found is None else fact("value", encode(found), str(found), "")


def _model(old: Plan, new: Plan) -> Iterator[Difference]:
    yield from _plain("model", "model_type", old.model.model_type, new.model.model_type)
    yield from _plain("model", "architecture", old.model.architecture, new.model.architecture)
    yield from compare_values("config", old.model.config, new.model.config)


def _stream(old: Plan, new: Plan) -> Iterator[Difference]:
    """Sequence parallelism that is turned on or off, in one sentence; or other places of the sharded stream."""
    if old.sequence_parallel is not None and new.sequence_parallel is not None:
        yield from compare_names("stream", stream_places(old), stream_places(new))
        return
    sides = (
        None
        if plan.sequence_parallel is None
        else fact("value", encode(plan.sequence_parallel), str(stream_words(plan)).removeprefix("sequence parallel: "))
        for plan in (old, new)
    )
    yield from compare_facts("sequence parallel", "sequence parallel", *sides)


def _inventory(old: Plan, new: Plan, found: Iterable[Difference]) -> Iterator[Difference]:
    """The hash over names, shapes and dtypes, where none of these that the plan says explains it."""
    named = {"shape", "dtype"}
    explained = any(
        one.of == "parameter" and (one.kind != "changed" or any(field.fact.key in named for field in one.fields))
        for one in found
    )
    if not explained:
        yield from _plain("model", "inventory", old.model.inventory, new.model.inventory)


def _totals(old: Plan, new: Plan) -> Iterator[Difference]:
    """Bytes of all parameters, those of each rank, and copies: derived from what was said, for who reviews it."""
    for one, other in zip(_total_facts(summary(old)), _total_facts(summary(new))):
        yield from compare_facts("total", one.title, one, other)


def _total_facts(totals: Summary) -> Iterator[Fact]:
    least, most = min(totals.per_rank), max(totals.per_rank)
    held = human_bytes(most) if least == most else f"{human_bytes(least)} to {human_bytes(most)}"
    yield fact("bytes", totals.total, human_bytes(totals.total), "all parameters")
    yield fact("bytes_per_rank", list(totals.per_rank), held, "each rank holds")
    yield fact("replicated", totals.replicated, human_bytes(totals.replicated), "replicated on every rank")
    copies = sum(totals.per_rank) - totals.total
    yield fact("copies", copies, human_bytes(copies), "copies over all ranks")


def _in_full(plan: Plan) -> Iterator[Stated]:
    for pattern in computed_in_full(plan):
        for name in expand(pattern):
            yield Stated(name, ())


def _records(old: Plan, new: Plan) -> Iterator[Difference]:
    """How the plans were made and proven, and what the compiler noted."""
    repositories = (
        None
        if plan.model.repository is None
        else fact("value", encode(plan.model.repository), str(plan.model.repository))
        for plan in (old, new)
    )
    yield from compare_facts("compiled from", "compiled from", *repositories)
    if old.rules is None or new.rules is None:
        rules = (None if one is None else fact("value", encode(one), str(one)) for one in (old.rules, new.rules))
        yield from compare_facts("compiled by", "compiled by", *rules)
    else:
        yield from compare_values("compiled by", encode(old.rules), encode(new.rules))
    yield from compare_names("note", notes(old), notes(new), folded=False)
    yield from _stamps(old, new)


def _stamps(old: Plan, new: Plan) -> Iterator[Difference]:
    """The stamps, but for what they have of the rest of the plan: its fingerprint and the seal."""
    said = [fact("value", _stamp_value(plan.verified), verified_words(plan)) for plan in (old, new)]
    yield from compare_facts("verified", "verified", *said)


def _stamp_value(stamp: Stamp | None) -> Any:
    if stamp is None:
        return None
    value = {key: one for key, one in encode(stamp).items() if key not in ("plan", "seal")}
    return {**value, "sealed": stamp.seal is not None}
