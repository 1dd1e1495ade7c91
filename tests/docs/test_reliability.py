"""Every promise of docs/reliability.md names a test that is there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.paths import ROOT

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def is_there(path: str, name: str) -> bool:
    file = ROOT / path
    found = ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ()
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in found)


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED.findall(PAGE))))
def test_a_promise_has_a_test(path: str, name: str) -> None:
    assert is_there(path, name)


def test_every_row_names_one() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20 and all(NAMED.search(row) for row in rows)
    assert not is_there("tests/test_package.py", "test_that_is_not_there")
