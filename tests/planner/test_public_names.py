"""What `autotp_plan.planner` offers, and that no package hides a module behind something of the same name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import autotp_plan.planner
import autotp_plan.schemas


def test_no_module_is_hidden_by_what_its_package_exports() -> None:
    seen = 0
    for package in (autotp_plan.planner, autotp_plan.schemas):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__"):
                continue
            module = importlib.import_module(found.name)
            parent, _, leaf = found.name.rpartition(".")
            assert isinstance(getattr(importlib.import_module(parent), leaf), ModuleType), f"{found.name} is hidden"
            assert getattr(importlib.import_module(parent), leaf) is module
            seen += 1
    assert seen > 40


def test_every_public_name_is_there() -> None:
    for name in autotp_plan.planner.__all__:
        assert getattr(autotp_plan.planner, name).__doc__, f"{name} has no docstring"
