"""The options that name a model that is not from transformers: the function that makes it, and its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from autotp_plan.schemas.errors import Fault, OptionError

if TYPE_CHECKING:
    from autotp_plan.factories.module_factory import ModuleFactory

_F = TypeVar("_F", bound=Callable[..., None])


def module_options(function: _F) -> _F:
    """Add `--module`, `--module-args` and `--small`; the command gets them as `factory`, None without `--module`."""

    @click.option(
        "--module",
        metavar="NAME",
        help="For a model that is not from transformers: package.module:function, which returns the nn.Module. Its "
        "module is imported and run.",
    )
    @click.option(
        "--module-args", metavar="JSON", help="Arguments for the function, as a JSON object or a file that holds one."
    )
    @click.option(
        "--small",
        "smalls",
        metavar="JSON",
        multiple=True,
        help="Arguments that make a small model, where those that are tried do not; a second one for another.",
    )
    @functools.wraps(function)
    def run(*args: Any, module: str | None, module_args: str | None, smalls: tuple[str, ...], **kwargs: Any) -> None:
        function(*args, factory=lambda: _factory(module, module_args, smalls), **kwargs)

    return run  # type: ignore[return-value]


def given_model(model: str | None, factory: ModuleFactory | None) -> None:
    """Check that there is a model.

    Raises:
        OptionError: neither a folder nor a function was given.
    """
    if model is None and factory is None:
        raise OptionError(
            Fault(
                code="no-model",
                what="there is no model",
                where="--model",
                got="neither --model nor --module",
                expected="a checkpoint folder or an id of the hub, a folder with a config.json, or a function",
                next="--model CHECKPOINT, or --module package.module:function",
            )
        )


def _factory(module: str | None, arguments: str | None, smalls: tuple[str, ...]) -> ModuleFactory | None:
    if module is None:
        if arguments is not None or smalls:
            raise OptionError(
                Fault(
                    code="arguments-without-module",
                    what="there are arguments, and no function to give them to",
                    where="--module-args" if arguments is not None else "--small",
                    got="no --module",
                    expected="--module too",
                    next="--module package.module:function, or leave the option out",
                )
            )
        return None
    from autotp_plan.factories.module_factory import ModuleFactory, parse_arguments

    return ModuleFactory(
        name=module,
        arguments={} if arguments is None else parse_arguments(arguments, "--module-args"),
        small=tuple(parse_arguments(one, "--small") for one in smalls),
    )
