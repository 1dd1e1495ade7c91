"""Asking a package whether it still has the private names that this project relies on, and as they were."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas.upstream import version


@dataclass(frozen=True, slots=True)
class Canary:
    """One name, and what would break if it moved.

    Attributes:
        name: `module:attribute.attribute`.
        breaks: what would break, in words.
        holds: given what the name stands for, whether it is as it was; None when it need only be there.
    """

    name: str
    breaks: str
    holds: Callable[[Any], object] | None = None

    @property
    def package(self) -> str:
        return self.name.partition(".")[0].partition(":")[0]

    def owner(self) -> tuple[Any, str]:
        """What has the last attribute of the name, and that attribute."""
        module, _, path = self.name.partition(":")
        found: Any = importlib.import_module(module)
        *steps, last = path.split(".")
        for step in steps:
            found = getattr(found, step)
        if isinstance(found, type):
            found = next((cls for cls in found.__mro__ if last in vars(cls)), found)
        return found, last


def problem(canary: Canary) -> str:
    """What is wrong with a name, and what breaks by it; empty when nothing is."""
    try:
        owner, name = canary.owner()
        found = getattr(owner, name)
        wrong = "" if canary.holds is None or canary.holds(found) else "it is not as it was"
    except Exception as error:  # whatever a changed upstream raises
        wrong = f"{type(error).__name__}: {error}"
    if not wrong:
        return ""
    return f"{canary.name} of {canary.package} {version(canary.package)}: {wrong}. This breaks: {canary.breaks}."


def takes(*parameters: str) -> Callable[[Any], bool]:
    """Whether a function has parameters of these names."""
    return lambda function: set(parameters) <= set(inspect.signature(function).parameters)


def uses(*names: str) -> Callable[[Any], bool]:
    """Whether the code of a function, or of any method of a class, has these attributes, globals and constants."""
    return lambda found: set(names) <= set(_words(found))


def _words(found: Any) -> Iterator[str]:
    functions = vars(found).values() if isinstance(found, type) else [found]
    for function in functions:
        if isinstance(function, property):
            function = function.fget
        code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
        if isinstance(code, types.CodeType):
            yield from _words_of_code(code)


def _words_of_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (one for one in constant if isinstance(one, str))
        elif isinstance(constant, types.CodeType):
            yield from _words_of_code(constant)
