"""The private names of torch.distributed for the store of its process groups, and for how long they wait.

`tests/runtime/test_canaries.py` asserts it in a second.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

from autotp_plan.schemas.upstream import private


def store_of_all_ranks() -> Any:
    """Keys and values that all ranks read and write. Relies on `distributed_c10d._get_default_store()`."""
    return private(distributed_c10d, "_get_default_store", "torch", "finding ranks that do not make a call")()


def set_time_limit(seconds: float) -> None:
    """Let every process group of this process end a collective with an error after so many seconds.

    Relies on `distributed_c10d._world.pg_map`, whose keys are the groups, and on `_set_pg_timeout(timeout, group)`.
    """
    used_for = "setting how long process groups wait"
    world = private(distributed_c10d, "_world", "torch", used_for)
    set_timeout = private(distributed_c10d, "_set_pg_timeout", "torch", used_for)
    for group in private(world, "pg_map", "torch", used_for):
        set_timeout(timedelta(seconds=seconds), group)
