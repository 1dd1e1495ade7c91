"""Inference in a process of its own, which ends itself when it takes too much memory."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.inference.infer import infer_module_spec, infer_spec

_EVERY = 0.2


def infer_and_watch(model: Path | ModuleFactory, most_bytes: int) -> dict[str, Any]:
    """As `infer_spec` or `infer_module_spec`; the process ends where it takes `most_bytes` more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def watch() -> None:
        while True:
            taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if taken > most_bytes:
                os._exit(MEMORY_EXIT)
            time.sleep(_EVERY)

    threading.Thread(target=watch, daemon=True).start()
    return infer_module_spec(model) if isinstance(model, ModuleFactory) else infer_spec(model)


MEMORY_EXIT = 44
"""Exit status of a process that took too much memory."""
