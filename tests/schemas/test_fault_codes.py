"""Every fault that the planner and the schemas make has a code, and one code stands for one kind of fault."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import PACKAGE

FOLDERS = ("planner", "schemas", "dequantize", "sources", "huggingface", "factories", "inference")


def faults_made(path: Path) -> Iterator[tuple[int, ast.expr | None, ast.expr | None]]:
    """Line, code and title of each `Fault(...)` and `book.add(...)` of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id == "Fault":
            yield node.lineno, named.get("code"), named.get("what")
            continue
        local = isinstance(node.func, ast.Name) and node.func.id == "_fault" and len(node.args) >= 5
        if local or (isinstance(node.func, ast.Attribute) and node.func.attr == "add" and len(node.args) >= 2):
            yield node.lineno, node.args[0], node.args[1]


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_fault_has_a_code(path: Path) -> None:
    for line, code, _ in faults_made(path):
        assert code is not None, f"{path}:{line} has no code"


def test_one_code_is_one_kind_of_fault() -> None:
    titles: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        for _, code, what in faults_made(path):
            if isinstance(code, ast.Constant) and isinstance(what, ast.Constant):
                titles[str(code.value)].add(str(what.value))
    assert len(titles) > 60
    assert {name: found for name, found in titles.items() if len(found) > 1} == {}
    assert [name for name in titles if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []
    by_title: dict[str, set[str]] = defaultdict(set)
    for name, found in titles.items():
        for title in found:
            by_title[title].add(name)
    assert {title: codes for title, codes in by_title.items() if len(codes) > 1} == {}
