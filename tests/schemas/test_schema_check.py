"""The quick check of documents beside jsonschema: both say the same of right documents and of wrong ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from autotp_plan.schemas import documents
from autotp_plan.schemas.schema_check import conforms
from tests.helpers.paths import PACKAGE

GOLDEN = PACKAGE.parent / "tests" / "golden"
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 0.5, 2**70, "", "x", "BF16", "a.b", "a\n", "sha256:" + 64 * "0", [], ["x"],
    [0, 1], [[0, 1]], {}, {"x": 1}, {"": 1},
]  # fmt: skip


def right(name: str) -> list[Any]:
    """Documents that are right, some of them from version 0.1."""
    found = {
        "plan": sorted((PACKAGE / "plans").rglob("tp*.json"))[:3] + sorted(GOLDEN.rglob("autotp_plan.json")),
        "spec": sorted((PACKAGE / "planner" / "presets").glob("*.json"))[:8],
        "shards": sorted(GOLDEN.rglob("autotp_shards.json")),
        "job": sorted(GOLDEN.rglob("autotp_checkpoint.json")),
    }
    return [json.loads(path.read_text(encoding="utf-8")) for path in found[name]]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a document with each of its keys."""
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ():
        yield value, key
        yield from places(value[key])


def changed(value: Any, draw: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        container, key = draw.choice(list(places(value)) or [(value, None)])
        kind = draw.randrange(5)
        if kind == 0 or key is None:
            return draw.choice([*ODD, value])
        if kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[draw.choice(["x", "", "name", "dim", "shape", key + "x"])] = container[key]
        elif kind == 3 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(draw.choice(ODD))
        if not list(places(value)):
            break
    return value


@pytest.mark.parametrize("name", ["plan", "spec", "shards", "job"])
def test_it_says_what_jsonschema_says(name: str) -> None:
    schema, validator = documents._schema(name), documents._validator(name)
    draw = random.Random(name)
    found = right(name)
    assert found
    differ, wrong = [], 0
    for _ in range(300):
        value = changed(draw.choice(found), draw)
        says = validator.is_valid(value)
        wrong += not says
        if conforms(value, schema, schema) != says:
            differ.append(json.dumps(value)[:500])
    assert not differ
    assert wrong > 100, "there is something to find"


@pytest.mark.parametrize("name", ["plan", "spec", "shards", "job"])
def test_it_knows_all_that_the_schemas_use(name: str) -> None:
    """One that it does not know would be right, and slow."""
    schema = documents._schema(name)
    for value in right(name):
        assert conforms(value, schema, schema) == documents._validator(name).is_valid(value)


def test_what_it_does_not_know_does_not_conform() -> None:
    assert not conforms(1, {"multipleOf": 1}, {})
    assert not conforms(1, {"$ref": "https://example.com/other"}, {})
    assert not conforms([1], {"const": [1]}, {})


def test_a_right_document_needs_no_jsonschema(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> Any:
        raise AssertionError(f"jsonschema was asked about {name}")

    monkeypatch.setattr(documents, "_validator", refused)
    for value in right("plan"):
        documents.validate(value, "plan", "plan")
    with pytest.raises(AssertionError, match="jsonschema was asked"):
        documents.validate({}, "plan", "plan")
