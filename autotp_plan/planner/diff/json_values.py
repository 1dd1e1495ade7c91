"""Where two JSON values differ: by path, down to single numbers and strings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

Path = tuple[str | int, ...]

_MOST_COMPARED = 250_000
"""Items of one list times those of the other: above, the items at one position are compared."""


class Missing:
    """The value of a key that a document does not have."""


MISSING = Missing()


class ValueChange(NamedTuple):
    """A value at a path before and after; `MISSING` where there is none."""

    path: Path
    old: Any
    new: Any


def canonical(value: Any) -> str:
    """JSON text that tells any two values apart: `1`, `1.0`, `true` and `"1"`, but not the order of keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def value_changes(old: Any, new: Any, path: Path = ()) -> Iterator[ValueChange]:
    """Where `new` is not `old`: the innermost values that changed.

    In lists of objects, such as rules, items that were inserted or removed are said as such; of other lists, such as
    the types of layers, the items at one position are compared.

    Args:
        old: a JSON value, or MISSING.
        new: the other one.
        path: where they are.
    """
    waiting: list[ValueChange] = [ValueChange(path, old, new)]
    while waiting:
        at, before, after = change = waiting.pop()
        if isinstance(before, dict) and isinstance(after, dict) and before and after:
            keys = [*before, *(key for key in after if key not in before)]
            inside = [ValueChange((*at, key), before.get(key, MISSING), after.get(key, MISSING)) for key in keys]
        elif isinstance(before, list) and isinstance(after, list) and before and after:
            inside = [ValueChange((*at, index), *pair) for index, pair in _pairs(before, after)]
        else:
            one, other = (None if value is MISSING else canonical(value) for value in (before, after))
            if one != other:
                yield change
            continue
        waiting += reversed(inside)


def _pairs(old: list[Any], new: list[Any]) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The items to compare with each other, each with its position in the list that has it, the new one first."""
    objects = any(isinstance(item, dict) for item in (*old, *new))
    if objects and len(old) * len(new) <= _MOST_COMPARED:
        matcher = difflib.SequenceMatcher(None, [*map(canonical, old)], [*map(canonical, new)], autojunk=False)
        blocks = [block[1:] for block in matcher.get_opcodes() if block[0] != "equal"]
    else:
        blocks = [(0, len(old), 0, len(new))]
    for old_start, old_stop, new_start, new_stop in blocks:
        both = min(old_stop - old_start, new_stop - new_start)
        for step in range(both):
            yield new_start + step, (old[old_start + step], new[new_start + step])
        for index in range(old_start + both, old_stop):
            yield index, (old[index], MISSING)
        for index in range(new_start + both, new_stop):
            yield index, (MISSING, new[index])


def path_text(path: Path) -> str:
    """`rope_scaling.factor`, `layer_types.3`."""
    return ".".join(map(str, path))
