"""The end of a process that has communicated over gloo.

A thread of gloo's first tells who waits that a collective is done, and then gives its tensors back, for which it needs
Python's lock. If it asks for the lock in the moment in which the interpreter begins to end, Python ends the thread in
the middle of C++, and the process aborts: "terminate called without an active exception", exit status -6, after a run
that went well. On a loaded machine the two can be apart by any time. So a process waits for these threads at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import time
from pathlib import Path

THREAD = "pt_gloo_runloop"
"""What torch calls the threads that run gloo's collectives."""

_LOOKS_APART = 0.001
_SECONDS = 10.0


@functools.cache
def wait_for_gloo_at_exit() -> None:
    """Let this process end when no thread of gloo's is about to give tensors back. Where there is none, at once."""
    atexit.register(wait_for_gloo)


def wait_for_gloo(seconds: float = _SECONDS) -> None:
    """Wait until the threads that run gloo's collectives sleep, in two looks between which none has run.

    Relies on their name, `THREAD`; `tests/runtime/test_canaries.py` asserts it.

    Args:
        seconds: how long at most.
    """
    deadline = time.monotonic() + seconds
    before: dict[str, str] | None = None
    while time.monotonic() < deadline:
        now = gloo_threads()
        if now == before and all(state.startswith("State:\tS") for state in now.values()):
            return
        before = now
        time.sleep(_LOOKS_APART)  # without Python's lock, which such a thread may wait for


def gloo_threads() -> dict[str, str]:
    """By its number, whether each thread that runs gloo's collectives sleeps, and how often it has run."""
    found = {}
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (thread / "comm").read_text().strip() == THREAD:
                lines = (thread / "status").read_text().splitlines()
                found[thread.name] = "\n".join(line for line in lines if line.startswith("State:") or "ctxt" in line)
    return found
