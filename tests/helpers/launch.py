"""Start ranks for a test: `run_ranks` with a timeout by default, and what tests import loaded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotp_plan.runtime.verify.workers import run_ranks

_PRELOAD = ("tests.helpers.parity", "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "transformers.trainer")


def launch(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on `world_size` fresh ranks; what each returned, by rank."""
    return run_ranks(function, world_size, *args, timeout=timeout, preload=_PRELOAD)
