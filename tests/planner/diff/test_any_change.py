"""Whatever is changed in a plan: the differences are empty exactly where both plans mean the same.

What a plan means is written down here a second time, from the JSON and not from the plan: names one by one, layouts in
the place of their names.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.planner.diff.compare import compare_plans
from autotp_plan.planner.diff.text import groups, lines
from autotp_plan.schemas.errors import DocumentError
from autotp_plan.schemas.names import expand
from tests.planner.diff.documents import EVERYTHING, WITH_STREAM, Document, plan_of

RECORDS = ("version", "rules", "ignored", "notes", "verified")
"""What no rank computes with; and the rule of each parameter and the repository."""


def meaning(document: Document, computed_alone: bool) -> list[str]:
    """What a document says, sorted, each thing as one text; with `computed_alone` only what a rank computes with."""
    said: list[Any] = []
    for key, value in document.items():
        if key in ("format", "fingerprint", "layouts") or (computed_alone and key in RECORDS):
            continue
        if key == "parameters":
            said += [one for entry in value for one in parameters(entry, document["layouts"])]
        elif key == "ignored":
            said += sorted({f"ignored {name}" for pattern in value for name in expand(pattern)})
        elif key == "module_attributes":
            said += [[key, name, one["attribute"], one["values"]] for one in value for name in expand(one["module"])]
        elif key == "modules":
            said += [[key, name, module(one)] for one in value for name in expand(one["module"])]
        elif key == "sequence_parallel":
            lists = {**value, "end": [value["end"]]}
            said += [[key, of, name] for of, patterns in lists.items() for one in patterns for name in expand(one)]
        elif key in ("tied", "notes"):
            said += [[key, one] for one in value]
        elif key == "runtime":
            said += [[key, name, one] for name, one in value.items() if one is not False]
        elif key == "rules":
            defaults = {
                "preset": "auto",
                "specs": [],
                "strict": False,
                "uneven": False,
                "cut_vision": False,
                "sequence_parallel": False,
            }
            said.append([key, {name: one for name, one in value.items() if defaults.get(name) != one}])
        elif key == "verified":
            stamp = {name: one for name, one in value.items() if name not in ("plan", "seal")}
            said.append([key, stamp, "seal" in value])
        elif key == "model":
            repository = value.get("repository")
            folder = {} if repository is None or repository.get("folder") else {"folder": ""}
            said.append([key, {**value, "repository": repository and {**repository, **folder}}])
        else:
            said.append([key, value])
    if computed_alone:
        for one in said:
            if one[0] == "model":
                del one[1]["repository"]
            if one[0] in ("tied", "parameter"):
                one[-1] = {name: value for name, value in one[-1].items() if name != "rule"}
    return sorted(json.dumps(one, sort_keys=True) for one in said)


def parameters(entry: Document, layouts: Document) -> Iterator[list[Any]]:
    layout = layouts[entry["layout"]]
    rest = {key: value for key, value in entry.items() if value is not False}
    on_disk = entry.get("sources", {"names": [entry.get("source", entry["name"])]})
    columns = [expand(name) for name in on_disk["names"]]
    for name, *names in zip(expand(entry["name"]), *columns):
        said = {key: value for key, value in rest.items() if key not in ("name", "source", "sources")}
        shape = entry.get("shape", layout["shape"])
        said |= {"layout": layout, "shape": shape, "names": names, "count": on_disk.get("count", 1)}
        yield ["parameter", name, said]


def module(entry: Document) -> Document:
    kept = {key: value for key, value in entry.items() if key != "module" and value not in (False, {})}
    inputs = {name: {**one, "intervals": one.get("intervals", [])} for name, one in entry.get("inputs", {}).items()}
    return {**kept, **({"inputs": inputs} if inputs else {})}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


FIRST = (EVERYTHING, WITH_STREAM)
PLACES = [[path for path in places(first) if path[0] not in ("format", "fingerprint")] for first in FIRST]
OTHER_WORDS = [
    "column", "row", "vocab", "shard", "replicated", "BF16", "F32", "F16", "rows", "columns", "same", "copy", "reduce",
    "float16", "model.embed.weight", "default for 1-D", "preset llama #1", "1.1", "up", "x",
]  # fmt: skip


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


@st.composite
def changes(draw: st.DrawFn) -> tuple[Document, Document, tuple[Any, ...]]:
    """A document, the same with another value at a place, and the place."""
    which = draw(st.sampled_from(range(len(FIRST))))
    first, all_places = FIRST[which], PLACES[which]
    document = copy.deepcopy(first)
    path = draw(st.sampled_from(all_places))
    parent, key, value = at(document, path[:-1]), path[-1], at(document, path)
    ways = ["remove", "copy"]
    ways += ["reverse"] * isinstance(value, (list, dict)) + ["repeat"] * isinstance(parent, list)
    way = draw(st.sampled_from([*ways, "another", "another", "another"]))
    if way == "remove":
        del parent[key]
    elif way == "repeat":
        parent.insert(key, copy.deepcopy(value))
    elif way == "reverse" and isinstance(value, list):
        value.reverse()
    elif way == "reverse":
        parent[key] = dict(reversed(value.items()))
    elif way == "copy":  # the value of a place of the same name: the layout of another parameter, and the like
        same = [other for other in all_places if other[-1] == key or (isinstance(key, int) and other[:-1] == path[:-1])]
        parent[key] = copy.deepcopy(at(first, draw(st.sampled_from(same))))
    elif isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, (int, float)):
        parent[key] = draw(st.sampled_from([value + 1, value - 1, value * 2, float(value)]))
    elif isinstance(value, str):
        parent[key] = draw(st.sampled_from([*OTHER_WORDS, value + "x", value.replace("{0..3}", "{0..2}")]))
    else:
        parent[key] = draw(st.sampled_from([None, [], {}, 0, "x"]))
    return first, document, path


def check(before: Document, document: Document) -> bool:
    """Whether a document is a plan; then its differences from the first plan are what they must be."""
    try:
        plan = plan_of(document)
    except DocumentError:
        return False
    first = plan_of(before)
    differences = compare_plans(first, plan)
    same = meaning(before, False) == meaning(document, False)
    assert differences.equal == same, differences
    assert differences.equal or lines(differences) or groups(differences)
    assert not same or differences.computes_the_same
    if differences.computes_the_same:
        assert meaning(before, True) == meaning(document, True)
    if plan.fingerprint != first.fingerprint and not same:
        assert differences.found
    back = compare_plans(plan, first)
    assert {(one.of, one.name, one.count) for one in back.found} == {
        (one.of, one.name, one.count) for one in differences.found
    }
    return True


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(changes())
def test_a_change_is_said_exactly_where_it_changes_what_the_plan_means(change: tuple[Document, Document, Any]) -> None:
    check(*change[:2])


@pytest.mark.slow
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(changes())
def test_many_changes(change: tuple[Document, Document, Any]) -> None:
    check(*change[:2])


@pytest.mark.parametrize("other", FIRST)
@pytest.mark.parametrize("first", FIRST)
def test_two_plans_are_equal_where_they_are_the_same(first: Document, other: Document) -> None:
    assert check(first, other)
