"""Folding the names of many layers into one: `model.layers.{0..31}.mlp.up_proj.weight`.

A plan stays readable because what is the same in every layer is one entry. Only dotted components that are decimal
numbers fold. `expand(fold(names))` gives the names back; the rest of the code works on single names.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from autotp_plan.schemas.errors import DocumentError, Fault

_BRACES = re.compile(r"\{([^{}]*)\}")
_LIST = re.compile(r"[0-9]{1,9}(\.\.[0-9]{1,9})?(,[0-9]{1,9}(\.\.[0-9]{1,9})?)*")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_INDICES = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
_DIGITS = frozenset("0123456789")
MAX_NAMES = 1_000_000


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key that orders `layers.2` before `layers.10`, whatever the number of digits."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return tuple((True, 0, part) if part[0] not in _DIGITS else (False, len(part.lstrip("0")), part) for part in parts)


BELOW = ".**"
"""Ending of a pattern that stands for every name below: `model.layers.61.**`."""


class NameSet:
    """The names that patterns stand for, those with `BELOW` at the end included.

    Raises:
        DocumentError: as `expand`.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        names = [name for pattern in patterns for name in expand(pattern)]
        self._names = {name for name in names if not name.endswith(BELOW)}
        self._beginnings = tuple(name.removesuffix("**") for name in names if name.endswith(BELOW))

    def __contains__(self, name: str) -> bool:
        return name in self._names or name.startswith(self._beginnings)


def is_index(part: str) -> bool:
    """Whether a component of a dotted name is a number that folds: `0`, `12`, but not `007`."""
    return _INDEX.fullmatch(part) is not None


def starred(name: str) -> str:
    """The name with `*` for each number that folds."""
    return _INDICES.sub("*", name)


def fold(names: Iterable[str]) -> list[str]:
    """The fewest simple patterns that expand to exactly `names`, in natural order.

    Names that differ only in their numbers become one pattern when the numbers form a full grid; if they do not, the
    first number is folded and the others stay.
    """
    by_template: dict[tuple[str | None, ...], set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        template = tuple(None if is_index(part) else part for part in parts)
        by_template[template].add(tuple(int(part) for part in parts if is_index(part)))
    folded: list[str] = []
    for template, found in by_template.items():
        columns = [sorted(set(column)) for column in zip(*found)]
        if math.prod(len(column) for column in columns) == len(found):
            folded.append(_fill(template, [_braces(column) for column in columns]))
        else:
            rest: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for first, *others in found:
                rest[tuple(others)].append(first)
            for others_key, firsts in rest.items():
                folded.append(_fill(template, [_braces(sorted(firsts)), *map(str, others_key)]))
    return sorted(folded, key=natural_key)


def some(names: Collection[str], most: int = 3) -> str:
    """The first of many names, and how many more there are; one that does not print is shown as Python writes it."""
    shown = [name if name.isprintable() else repr(name) for name in itertools.islice(names, most)]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def parent_module(name: str) -> str:
    """The module that holds the module of a parameter: `layers.0.mlp` for `layers.0.mlp.up_proj.weight`."""
    return name.rpartition(".")[0].rpartition(".")[0]


def expand(pattern: str) -> list[str]:
    """Every name that `pattern` stands for, in natural order.

    Raises:
        DocumentError: the braces are not `{a..b}` or `{a,b,c..d}`, or stand for more than `MAX_NAMES` names.
    """
    choices = [[str(n) for ends in ranges for n in range(ends[0], ends[-1] + 1)] for ranges in _ranges(pattern)]
    literals = _BRACES.split(pattern)[::2]
    names = literals[:1]
    for choice, literal in zip(choices, literals[1:]):
        ends = [number + literal for number in choice]
        names = [name + end for name in names for end in ends]
    return names


def num_names(pattern: str) -> int:
    """How many names `pattern` stands for, without making them.

    Raises:
        DocumentError: as `expand`.
    """
    return math.prod(sum(ends[-1] - ends[0] + 1 for ends in ranges) for ranges in _ranges(pattern))


def _ranges(pattern: str) -> list[list[list[int]]]:
    """For each pair of braces its ranges of numbers, each `[number]` or `[first, last]`."""
    found: list[list[list[int]]] = []
    count = 1
    for body in _BRACES.findall(pattern):
        if not _LIST.fullmatch(body):
            raise DocumentError(_bad_braces(pattern, "{" + body + "}"))
        ranges = [[int(end) for end in part.split("..")] for part in body.split(",")]
        if any(ends[0] > ends[-1] for ends in ranges):
            raise DocumentError(_bad_braces(pattern, "{" + body + "}"))
        count *= sum(ends[-1] - ends[0] + 1 for ends in ranges)
        if count > MAX_NAMES:
            raise DocumentError(_bad_braces(pattern, f"more than {MAX_NAMES} names"))
        found.append(ranges)
    if any("{" in literal or "}" in literal for literal in _BRACES.split(pattern)[::2]):
        raise DocumentError(_bad_braces(pattern, "an unbalanced brace"))
    return found


def _fill(template: Sequence[str | None], values: Sequence[str]) -> str:
    remaining = iter(values)
    return ".".join(next(remaining) if part is None else part for part in template)


def _braces(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] + 1 == number:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return "{" + ",".join("..".join(map(str, ends)) for ends in ranges) + "}"


def _bad_braces(pattern: str, got: str) -> Fault:
    return Fault(
        code="bad-name-pattern",
        what="a name pattern cannot be expanded",
        where=pattern,
        got=got,
        expected="numbers in braces, such as {0..31} or {0,2,4..7}",
        next="plans are written by `autotp-plan compile`; compile again instead of editing by hand",
    )
