"""`ModuleFactory`: the function that makes a user's model, and what is said when it cannot be called.

Imports nothing but the module that is named. torch is imported when the function is called, never before.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotp_plan.schemas.documents import read_json
from autotp_plan.schemas.errors import DocumentError, Fault, OptionError

_EXPECTED = "package.module:function, found from the current folder or among the installed packages"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFactory:
    """A function that returns an `nn.Module`.

    Attributes:
        name: `package.module:function`.
        arguments: what it is called with; the others keep their defaults.
        small: for each small model the arguments that are others than in the model itself.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    small: tuple[Mapping[str, Any], ...] = ()

    def function(self) -> Any:
        """The function itself.

        Raises:
            OptionError: the module cannot be imported, or has no such function.
        """
        module_name, colon, path = self.name.partition(":")
        if (
            not colon
            or not path
            or not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")])
        ):
            raise OptionError(_no_name(self.name))
        here = str(Path.cwd())
        if here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)
        try:
            found: Any = importlib.import_module(module_name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the user's module does when it is imported
            raise OptionError(_not_imported(module_name, error)) from None
        for step in path.split("."):
            if not hasattr(found, step):
                raise OptionError(_no_function(self.name, path, found))
            found = getattr(found, step)
        if not callable(found):
            raise OptionError(_no_function(self.name, path, found))
        return found

    def config(self) -> dict[str, Any]:
        """Every argument that JSON can express, those that are not given by their defaults.

        Raises:
            OptionError: as `function`, or an argument that it does not take.
        """
        try:
            parameters = inspect.signature(self.function()).parameters
        except (TypeError, ValueError):  # a function without a signature
            return dict(self.arguments)
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            unknown = sorted({*self.arguments, *(key for one in self.small for key in one)} - parameters.keys())
            if unknown:
                raise OptionError(_unknown_arguments(self.name, unknown, list(parameters)))
        defaults = {key: one.default for key, one in parameters.items() if one.default is not inspect.Parameter.empty}
        return {key: value for key, value in {**defaults, **self.arguments}.items() if _is_json(value)}

    def make(self, changes: Mapping[str, Any] | None = None) -> Any:
        """The model, on the device that is current.

        Args:
            changes: arguments in addition, or others.

        Raises:
            OptionError: as `function`, or it raises or returns something else.
        """
        import torch

        function = self.function()
        arguments = {**self.arguments, **(changes or {})}
        try:
            model = function(**arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's code
            raise OptionError(_raised(self.name, arguments, error)) from None
        if not isinstance(model, torch.nn.Module):
            raise OptionError(_no_module(self.name, model))
        return model

    def on_meta(self, changes: Mapping[str, Any] | None = None) -> Any:
        """The model without values: for names, shapes and dtypes. Raises as `make`."""
        import torch

        try:
            with torch.device("meta"):
                return self.make(changes)
        except OptionError as refused:
            from accelerate import init_empty_weights

            try:  # code that looks at numbers of its buffers
                with init_empty_weights(include_buffers=False):
                    return self.make(changes)
            except OptionError:
                raise refused from None

    def with_arguments(self, changes: Mapping[str, Any]) -> ModuleFactory:
        """The same function with arguments in addition, or others."""
        return replace(self, arguments={**self.arguments, **changes})

    def build(self) -> Any:
        """The model, with the first of `small`; pickled, it is what a rank is given."""
        return self.make(self.small[0] if self.small else None)


def parse_arguments(text: str, option: str) -> dict[str, Any]:
    """The arguments that an option gives: a JSON object, or the path of a file that holds one.

    Args:
        text: of the option.
        option: its name, for messages.

    Raises:
        OptionError: neither.
    """
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else read_json(Path(text), option)
    except (ValueError, DocumentError, OSError, RecursionError) as error:
        reason = error.faults[0].got if isinstance(error, DocumentError) else str(error)
        raise OptionError(_no_arguments(option, f"{text[:80]}: {reason}")) from None
    if not isinstance(found, dict):
        raise OptionError(_no_arguments(option, type(found).__name__))
    return found


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def _no_name(name: str) -> Fault:
    return Fault(
        code="no-module-name",
        what="this does not name a function",
        where="--module",
        got=name,
        expected=_EXPECTED,
        next="--module package.module:function",
    )


def _not_imported(module: str, error: BaseException) -> Fault:
    return Fault(
        code="module-not-imported",
        what="the module that is to make the model cannot be imported",
        where=f"--module {module}",
        got=f"{type(error).__name__}: {error}",
        expected=_EXPECTED,
        next=f"run `python -c 'import {module}'` in the folder from which it is found, and compile there",
    )


def _no_function(name: str, path: str, found: Any) -> Fault:
    public = sorted(key for key, value in vars(found).items() if callable(value) and not key.startswith("_")) if (
        hasattr(found, "__dict__")
    ) else []  # fmt: skip
    return Fault(
        code="no-such-function",
        what="the module has no such function",
        where=f"--module {name}",
        got=f"{path} is missing or cannot be called; there are {', '.join(public[:12]) or 'none'}",
        expected="a function, or a class, that returns an nn.Module",
        next="name one that the module has",
    )


def _unknown_arguments(name: str, unknown: list[str], known: list[str]) -> Fault:
    return Fault(
        code="unknown-module-arguments",
        what="the function does not take these arguments",
        where=f"--module {name}",
        got=", ".join(unknown),
        expected=f"some of {', '.join(known) or 'none'}",
        next="give --module-args and --small arguments that the function has",
    )


def _no_arguments(option: str, got: str) -> Fault:
    return Fault(
        code="no-module-arguments",
        what="these are no arguments for a function",
        where=option,
        got=got,
        expected="a JSON object of arguments by name, or a file that holds one",
        next=f"{option} '{{\"width\": 1024}}'",
    )


def _raised(name: str, arguments: Mapping[str, Any], error: BaseException) -> Fault:
    called = f"{name.partition(':')[2]}({_shown(arguments)})"
    return Fault(
        code="factory-raised",
        what="the function that makes the model raised an error",
        where=f"--module {name}",
        got=f"{called}: {type(error).__name__}: {error}",
        expected="an nn.Module, also under torch.device('meta') and with smaller sizes",
        next="give the arguments that it needs with --module-args, and those of a small model with --small",
    )


def _no_module(name: str, found: Any) -> Fault:
    return Fault(
        code="factory-gives-no-module",
        what="the function that is to make the model returns something else",
        where=f"--module {name}",
        got=type(found).__name__,
        expected="an nn.Module",
        next="name a function that returns the model itself",
    )
