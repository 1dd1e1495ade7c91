"""Differences as a table and sentences, for people. Returns text; printing is the CLI's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autotp_plan.planner.diff.differences import Difference, Differences, Fact, FieldChange, Kind
from autotp_plan.planner.plan_table import MOST_ROWS, layer_prefix

_IN_TABLE = (
    "plan",
    "runtime",
    "model",
    "config",
    "parameter",
    "tied",
    "attribute",
    "module",
    "stream",
    "tensor",
    "ignored",
)
_ABSENT = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffRow:
    """One line of the table: a field of a name. The name is empty where the line above has it."""

    name: str
    what: str
    old: str
    new: str
    kind: Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A sentence, and whether it is of the old document (removed), the new one (added) or both."""

    text: str
    kind: Kind


def groups(differences: Differences) -> list[tuple[str, list[DiffRow]]]:
    """The table in groups: `("model.layers.{0..31}.", rows of those layers)`, and `("", rows outside of layers)`.

    They are of the first `MOST_ROWS` names.
    """
    found: list[tuple[str, list[DiffRow]]] = []
    for one in _in_table(differences)[:MOST_ROWS]:
        prefix = "" if one.of == "config" else layer_prefix(one.name)
        if not found or found[-1][0] != prefix:
            found.append((prefix, []))
        found[-1][1].extend(_rows(one, one.name.removeprefix(prefix)))
    return found


def _in_table(differences: Differences) -> list[Difference]:
    """The differences that have rows: not those whose every change is said elsewhere."""
    return [one for one in differences.found if one.of in _IN_TABLE and any(field.shown for field in one.fields)]


def _rows(one: Difference, name: str) -> Iterator[DiffRow]:
    if one.of in _ADDED and one.kind != "changed":
        facts = [fact for field in one.fields if (fact := field.old or field.new) is not None]
        said = ", ".join(_with_title(fact, one.of) for fact in facts)
        old, new = (said, _ABSENT) if one.kind == "removed" else (_ABSENT, said)
        yield DiffRow(name=name, what=_ADDED[one.of].format(one.kind), old=old, new=new, kind=one.kind)
        return
    for field in one.fields:
        if field.shown:
            old, new = (_ABSENT if fact is None else fact.words for fact in (field.old, field.new))
            yield DiffRow(name=name, what=field.fact.title, old=old, new=new, kind=one.kind)
            name = ""


_ADDED = {"parameter": "{}", "tied": "tie {}", "module": "collectives {}", "stream": "sequence parallel {}"}
_BARE = frozenset({"shape", "dtype", "style", "held"})


def _with_title(fact: Fact, of: str) -> str:
    """A fact of a parameter that is new or gone, as `show` has it; other facts need their titles."""
    if of == "parameter" and fact.key in _BARE:
        return fact.words
    if of == "stream":
        return fact.words
    if fact.key == "bytes_per_rank":
        return f"{fact.words} {fact.title}"
    return fact.words if fact.key == "rule" else f"{fact.title} {fact.words}"


def lines(differences: Differences) -> list[Line]:
    """What the table does not say, in sentences: totals, notes, how the plans were made and proven; a conclusion."""
    said = [line for one in differences.found if one.of not in _IN_TABLE for line in _lines(one)]
    moved = sum(one.count for one in differences.found if any(_is_moved_rule(field) for field in one.fields))
    if moved:
        said.append(Line(text=f"the rules of {moved} parameters say the same under other numbers", kind="changed"))
    more = len(_in_table(differences)) - MOST_ROWS
    if more > 0:
        said.append(Line(text=f"not in the table: {more} more names; --format json has all", kind="changed"))
    return [*said, *(Line(text=text, kind="changed") for text in _conclusion(differences))]


def _is_moved_rule(field: FieldChange) -> bool:
    return not field.shown and field.fact.key == "rule"


def _lines(one: Difference) -> Iterator[Line]:
    if one.of in ("note", "computed in full"):
        title = "note" if one.of == "note" else "computed in full on every rank"
        yield Line(text=f"{title}: {one.name}", kind=one.kind)
        return
    for field in one.fields:
        old, new = ("none" if fact is None else fact.words for fact in (field.old, field.new))
        if (one.of == "compiled by" and one.kind == "changed") or len(old) + len(new) < 60:
            yield Line(text=f"{one.name}: {old} -> {new}", kind="changed")
            continue
        name = "" if one.of == "verified" else f"{one.name}: "
        if field.old is not None:
            yield Line(text=f"{name}{old}", kind="removed")
        if field.new is not None:
            yield Line(text=f"{name}{new}", kind="added")


def _conclusion(differences: Differences) -> Iterator[str]:
    old, new = differences.old, differences.new
    if differences.equal:
        yield (
            "no difference"
            if old.fingerprint == new.fingerprint or None in (old.fingerprint, new.fingerprint)
            else ("no difference but in how they are written: the fingerprints are not the same")
        )
        return
    if differences.computes_the_same:
        yield "what each rank holds and computes is the same"
        return
    if None in (old.fingerprint, new.fingerprint):
        yield "the model is not the one that the plan is for"
        return
    changed = sum(one.count for one in differences.found if one.of == "parameter" and one.is_computed)
    if not changed:
        yield "what a rank holds or computes differs"
    else:
        of = f" of {old.num_parameters}" if old.num_parameters == new.num_parameters else ""
        yield f"{changed}{of} parameters differ in what a rank holds or computes"
