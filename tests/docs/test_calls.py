"""docs/calls.md lists every public method of the classes it is about, and names tests that are there."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from typing import Any

import pytest
from torch import nn

from tests.helpers.calls_page import GROUPS, NO_WEIGHTS, PAGE, Row, rows
from tests.helpers.paths import ROOT

ALL = ("PreTrainedModel", "GenerationMixin", "DeepSpeedEngine", "Trainer")
"""The classes of which every method is listed; of nn.Module and deepspeed.utils those that matter."""


def upstream(section: str) -> Any:
    import deepspeed.utils
    import transformers

    if section == "nn.Module":
        return nn.Module
    if section == "deepspeed.utils":
        return deepspeed.utils
    return deepspeed.DeepSpeedEngine if section == "DeepSpeedEngine" else getattr(transformers, section)


def public_methods(cls: type[Any]) -> set[str]:
    """The methods and properties of a class and its mixins, without those that are nn.Module's alone."""
    found = set()
    for base in cls.__mro__:
        if base not in (object, nn.Module):
            for name, value in vars(base).items():
                is_method = inspect.isroutine(value) or isinstance(value, (property, functools.cached_property))
                if is_method and not name.startswith("_"):
                    found.add(name)
    return found


def unlisted(section: str, listed: list[Row]) -> set[str]:
    """Methods that the page does not have."""
    return public_methods(upstream(section)) - {call for row in listed if row.section == section for call in row.calls}


def unknown(listed: list[Row]) -> set[str]:
    """Calls of the page that are not there."""
    found = set()
    for row in listed:
        for call in row.calls:
            module, _, name = call.rpartition(".")
            if not hasattr(importlib.import_module(module) if module else upstream(row.section), name):
                found.add(call)
    return found


def untested(listed: list[Row]) -> set[str]:
    """Tests of the page that are not there, and rows without one."""
    missing = {f"no test: {row.calls[0]}" for row in listed if not row.tests and row.group != NO_WEIGHTS}
    for test in {test for row in listed for test in row.tests}:
        file, _, function = test.partition("::")
        path = ROOT / "tests" / file
        if not path.is_file() or (function and function not in functions(path.read_text(encoding="utf-8"))):
            missing.add(test)
    return missing


def functions(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


LISTED = rows()


@pytest.mark.parametrize("section", ALL)
def test_every_public_method_is_listed(section: str) -> None:
    assert not unlisted(section, LISTED)


def test_what_is_listed_exists() -> None:
    assert not unknown(LISTED)
    assert {row.group for row in LISTED} == set(GROUPS)


def test_what_is_named_as_a_test_exists() -> None:
    assert not untested(LISTED)


def test_a_call_is_listed_once() -> None:
    named = [(row.section, call) for row in LISTED for call in row.calls]
    assert len(named) == len(set(named))


def test_planted_errors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "share_weights", lambda self: None, raising=False)
    assert unlisted("PreTrainedModel", LISTED) == {"share_weights"}
    text = PAGE.read_text(encoding="utf-8")
    assert unknown(rows(text.replace("| `num_parameters` |", "| `count_parameters` |"))) == {"count_parameters"}
    wrong = rows(text.replace("test_other_embeddings_are_refused`", "test_no_such`"))
    assert untested(wrong) == {"runtime/calls/test_vocabulary.py::test_no_such"}
    assert untested(rows("## `Trainer`\n### Refused\n| `train` | never | |")) == {"no test: train"}
