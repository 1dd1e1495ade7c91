"""Which operators run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def counted(function: Any) -> tuple[Any, Counter[str]]:
    """What `function` returns, and how often each operator has run."""
    ran: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran[func.name().partition(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        found = function()
    return found, ran
