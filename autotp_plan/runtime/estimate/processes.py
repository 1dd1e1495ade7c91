"""Processes that run a model's code without data; each can be one rank of one world, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotp_plan.runtime.verify.workers import RankError, run_ranks
from autotp_plan.schemas.errors import CompileError, Fault

TIMEOUT = 600
"""Seconds that processes which run at the same time may take."""


def run_without_data(
    function: Callable[..., Any], number: int, *arguments: Any, where: str, what: str, timeout: float
) -> list[Any]:
    """What `function(*arguments)` returns in each of `number` new processes.

    Args:
        function: importable by its name.
        number: of processes.
        arguments: the same for each.
        where: whose steps they are, for an error.
        what: what is run, for an error: `two steps`.
        timeout: seconds.

    Raises:
        AutoTPError: the one that a process raised.
        CompileError: the model's code does not run without data, or takes too long.
    """
    try:
        return run_ranks(function, number, *arguments, timeout=timeout)
    except RankError as error:
        raise CompileError(
            Fault(
                code="estimate-stopped",
                what="the training step could not be run without data",
                where=where,
                got=str(error),
                expected=f"{what} within {timeout:.0f} s",
                next="read the plan alone: --no-run",
            )
        ) from error
