"""The file calls of this process below one folder: counted, logged, made to fail, and stopped at. See `files.c`."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("files.c")
_ACTIONS = ("nothing", "kill", "kill all", "fail", "fail from there", "short", "stop")


@dataclass(frozen=True, kw_only=True, slots=True)
class Disturbance:
    """What happens at a file call.

    Attributes:
        action: one of `nothing`, `kill` (this process), `kill all` (every rank), `fail`, `fail from there` (each call
            that needs space, from then on), `short` (half is written), `stop` (SIGSTOP).
        number: at which call, from 1 on.
        error: the error number of a call that fails.
        reads: calls that read are counted, not those that change something.
    """

    action: str = "nothing"
    number: int = 0
    error: int = 0
    reads: bool = False


def build(folder: Path) -> Path:
    """Compile the library into a folder."""
    library = folder / "files.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl", "-lpthread"], check=True)
    return library


def arm(root: Path, what: Disturbance, processes: Sequence[int] = ()) -> None:
    """From now on calls below `root` are counted, and one is disturbed; `processes` are those of all ranks."""
    ids = (ctypes.c_int * max(1, len(processes)))(*processes)
    action = _ACTIONS.index(what.action)
    _library().faults_arm(os.fsencode(root), action, what.number, what.error, int(what.reads), ids, len(processes))


def disarm() -> int:
    """No longer; returns how many calls there were."""
    count: int = _library().faults_disarm()
    return count


def log_to(log: Path | None) -> None:
    """Append what calls change to a log, all ranks to the same; None for no log any more."""
    _library().faults_log(*((os.fsencode(log), os.fsencode(f"{log}.lock")) if log else (None, None)))


def leave_out(*, syncs: bool = False, locks: bool = False, lock_error: int = 0) -> None:
    """Planted: `fsync` and `flock` do nothing; or a file system whose locks fail with an error."""
    _library().faults_without(int(syncs), int(locks), lock_error)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["LD_PRELOAD"])
