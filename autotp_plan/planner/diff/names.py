"""Names in two documents, what is said of them, and what changed: layers with the same changes are one difference."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from autotp_plan.planner.diff.differences import Difference, Fact, FieldChange, Kind
from autotp_plan.planner.diff.json_values import MISSING, Path, path_text, value_changes
from autotp_plan.planner.diff.plan_facts import Stated, bytes_fact, fact, on_disk_fact
from autotp_plan.schemas.names import expand, fold, natural_key, starred

_Pair = tuple[Stated | None, Stated | None]
"""What two documents say of one name; None where one has no such name."""


class _Changes(NamedTuple):
    """What layers must have in common to be one difference. `on_disk` are names with starred numbers."""

    kind: Kind
    fields: tuple[FieldChange, ...]
    on_disk: Hashable


def compare_names(of: str, old: Iterable[Stated], new: Iterable[Stated], folded: bool = True) -> list[Difference]:
    """What changed of names of one kind.

    Args:
        of: the kind.
        old: what the old document says of each name.
        new: what the new one says.
        folded: whether names that differ in their numbers alone are one difference, where all else is the same.
    """
    before, after = _by_name(old), _by_name(new)
    pairs = (itertools.zip_longest(before.get(key, ()), after.get(key, ())) for key in {**before, **after})
    return _grouped(of, list(itertools.chain.from_iterable(pairs)), folded)


def _grouped(of: str, pairs: Iterable[_Pair], folded: bool = True) -> list[Difference]:
    """The differences of names, each with what the two documents say of it."""
    known: dict[tuple[int, int], tuple[FieldChange, ...]] = {}
    told: dict[tuple[Fact, Fact], FieldChange] = {}
    same: dict[tuple[_Changes, Hashable], list[_Pair]] = defaultdict(list)
    for old, new in pairs:
        places = (id(old.facts) if old else 0, id(new.facts) if new else 0)
        if places not in known:
            known[places] = tuple(_changed(old.facts if old else (), new.facts if new else (), told))
        kind: Kind = "added" if old is None else "removed" if new is None else "changed"
        changes = _Changes(kind, known[places], _on_disk(old, new))
        if changes.fields or changes.on_disk or kind != "changed":
            one = new or old
            assert one is not None, "a pair has at least one side"
            same[changes, one.scope if folded else (one.scope, one.name)].append((old, new))
    found = [one for (changes, _), members in same.items() for one in _folded(of, changes, members, folded)]
    return sorted(found, key=lambda one: natural_key(one.name.replace("{", "")))


def _by_name(stated: Iterable[Stated]) -> dict[tuple[str, Any], list[Stated]]:
    found: dict[tuple[str, Any], list[Stated]] = {}
    for one in stated:
        found.setdefault((one.name, one.scope), []).append(one)
    return found


def _on_disk(old: Stated | None, new: Stated | None) -> Hashable:
    """The names on disk, numbers starred, where they changed; None where they did not."""
    both = tuple(one and (one.on_disk, one.stacked) for one in (old, new))
    if both[0] == both[1] or (None in both and (None, 1) in both):
        return None
    return tuple(one and (tuple(map(starred, _names_on_disk(one))), one.stacked) for one in (old, new))


def _names_on_disk(one: Stated) -> tuple[str, ...]:
    return (one.name,) if one.on_disk is None else one.on_disk


def _folded(of: str, changes: _Changes, pairs: list[_Pair], folded: bool) -> Iterator[Difference]:
    """The differences of names whose changes are the same."""
    by_name = {(new or old).name: (old, new) for old, new in pairs}  # type: ignore[union-attr]
    if not folded or len(by_name) == 1 or any("{" in name or "}" in name for name in by_name):
        patterns = {name: [name] for name in by_name}
    else:
        patterns = {pattern: expand(pattern) for pattern in fold(by_name)}
    for pattern, names in patterns.items():
        fields = tuple(_times(field, len(names)) for field in changes.fields)
        if changes.on_disk:
            old, new = zip(*(by_name[name] for name in names))
            fields += (FieldChange(old=_disk_fact(old), new=_disk_fact(new)),)
        yield Difference(of=of, name=pattern, count=len(names), kind=changes.kind, fields=fields)


def _disk_fact(members: tuple[Stated | None, ...]) -> Fact | None:
    """The tensors on disk of all members: one pattern for each position where that is possible."""
    held = [_names_on_disk(one) for one in members if one is not None]
    if not held or members[0] is None:
        return None
    return on_disk_fact(tuple(map(_in_order, zip(*held))), members[0].stacked)


def _in_order(names: Sequence[str]) -> str:
    """One pattern that expands to the names in their order, or all of them."""
    patterns = fold(names) if not any("{" in name or "}" in name for name in names) else []
    return patterns[0] if len(patterns) == 1 and expand(patterns[0]) == list(names) else ", ".join(names)


def _times(change: FieldChange, count: int) -> FieldChange:
    """The change of `count` layers: bytes are those of all of them."""
    if change.fact.key != "bytes_per_rank" or count == 1:
        return change
    old, new = (None if one is None else bytes_fact(count * one.value) for one in (change.old, change.new))
    return dataclasses.replace(change, old=old, new=new)


def _changed(
    old: tuple[Fact, ...], new: tuple[Fact, ...], told: dict[tuple[Fact, Fact], FieldChange]
) -> Iterator[FieldChange]:
    """The facts that are not the same, in the order of the new ones; `told` are those of other names."""
    before, after = ({one.key: one for one in facts} for facts in (old, new))
    for key in [*after, *(key for key in before if key not in after)]:
        one, other = before.get(key), after.get(key)
        if one is None or other is None:
            # units of what was not sharded before are said by its style
            yield FieldChange(old=one, new=other, shown=key != "sub_parameters")
        elif one.json != other.json:
            if (one, other) not in told:
                told[one, other] = _told_apart(one, other)
            yield told[one, other]


def _told_apart(old: Fact, new: Fact) -> FieldChange:
    """A change whose words differ too: where the usual ones do not, more is said."""
    if old.words != new.words:
        return FieldChange(old=old, new=new, shown=old.content is None or old.content != new.content)
    one, other = old.value, new.value
    if not (isinstance(one, dict) and isinstance(other, dict) and "intervals" in one and "intervals" in other):
        return _with_words(old, new, old.json, new.json)
    if old.key == "held" and _proportional(one, other):
        return FieldChange(old=old, new=new, shown=False)
    ranks = itertools.zip_longest(one["intervals"], other["intervals"])
    differing = next(((rank, *both) for rank, both in enumerate(ranks) if both[0] != both[1]), None)
    if differing is None:
        return _with_words(old, new, old.json, new.json)
    rank, first, second = differing
    said = (f"{old.words}, rank {rank}: {_interval_words(part)}" for part in (first, second))
    return _with_words(old, new, *said)


def _with_words(old: Fact, new: Fact, old_words: str, new_words: str) -> FieldChange:
    return FieldChange(old=dataclasses.replace(old, words=old_words), new=dataclasses.replace(new, words=new_words))


def _proportional(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two layouts of dimensions of different sizes are the same in parts of the dimension."""
    if one["size"] == other["size"] or one["dim"] != other["dim"]:
        return False
    first, second = (json.dumps(held["intervals"]) for held in (one, other))
    scaled = [
        [[[edge * factor["size"] for edge in part] for part in rank] for rank in held["intervals"]]
        for held, factor in ((one, other), (other, one))
    ]
    return first != second and scaled[0] == scaled[1]


def _interval_words(intervals: list[list[int]] | None) -> str:
    if intervals is None:
        return "-"
    return ", ".join(f"{start}..{stop}" for start, stop in intervals) or "nothing"


def compare_facts(of: str, name: str, old: Fact | None, new: Fact | None) -> Iterator[Difference]:
    """The difference of two values of a name that has no more than one; none where they are the same."""
    if (old and old.json) == (new and new.json):
        return
    kind: Kind = "added" if old is None else "removed" if new is None else "changed"
    change = FieldChange(old=old, new=new) if old is None or new is None else _told_apart(old, new)
    yield Difference(of=of, name=name, count=1, kind=kind, fields=(change,))


def compare_values(of: str, old: Any, new: Any) -> list[Difference]:
    """What changed inside of a JSON value, by path; None is that there is no such value."""
    pairs: list[_Pair] = []
    sides = (MISSING if old is None else old, MISSING if new is None else new)
    for path, *values in value_changes(*sides):
        name, scope = path_text((of, *path)), _scope(path)
        one, other = (
            None if value is MISSING else Stated(name, (fact("value", value, title=""),), scope=scope)
            for value in values
        )
        pairs.append((one, other))
    return _grouped(of, pairs)


def _scope(path: Path) -> tuple[str | None, ...]:
    """The keys of a path: `a.b` is one key or two, and a number is an index or a key."""
    return tuple(None if isinstance(part, int) else part for part in path)
