"""The private name of torch.distributed for the store through which its process groups were made.

`tests/runtime/test_canaries.py` asserts it in a second.
"""

from __future__ import annotations

from typing import Any

from torch.distributed import distributed_c10d

from autotp_plan.schemas.upstream import private


def store_of_all_ranks() -> Any:
    """Keys and values that all ranks read and write. Relies on `distributed_c10d._get_default_store()`."""
    return private(distributed_c10d, "_get_default_store", "torch", "finding ranks that do not make a call")()
