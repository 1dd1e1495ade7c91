"""Inference in a process of its own, which cannot take more memory than it is given.

What it asks for at once is refused by the kernel (`RLIMIT_DATA`: private memory, used or not), and an error says so.
What it takes bit by bit ends it.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.inference.infer import infer_module_spec, infer_spec

MEMORY_EXIT = 44
"""Exit status of a process that took too much memory."""
_EVERY = 0.02
_NEAR = 0.95


def infer_and_watch(model: Path | ModuleFactory, most_bytes: int) -> dict[str, Any]:
    """As `infer_spec` or `infer_module_spec`; the process ends where it takes `most_bytes` more than before."""
    before = _private_bytes()
    resident = _peak_bytes()

    def watch() -> None:
        while True:
            if max(_private_bytes() - before, _peak_bytes() - resident) > _NEAR * most_bytes:
                os._exit(MEMORY_EXIT)
            time.sleep(_EVERY)

    threading.Thread(target=watch, daemon=True).start()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before + most_bytes, hard))
    try:
        return infer_module_spec(model) if isinstance(model, ModuleFactory) else infer_spec(model)
    except MemoryError:
        os._exit(MEMORY_EXIT)


def _private_bytes() -> int:
    """What `RLIMIT_DATA` counts."""
    with open("/proc/self/status") as status:
        kib = next((line.split()[1] for line in status if line.startswith("VmData")), "0")
    return int(kib) * 1024


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
