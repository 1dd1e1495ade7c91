"""Programs that tests start and never leave behind: what a launcher started is killed with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

_MARK = "AUTOTP_TEST_PROGRAM"
_MODULES = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}

Command = Sequence[object]
"""The words of a command. `python`, `torchrun` and `deepspeed` are those of the environment that runs the tests."""


@contextlib.contextmanager
def started(
    command: Command, cwd: Path | None = None, *, output: int = subprocess.PIPE, unset: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A running program, killed at the end of the block with all that it started.

    Its two streams are one, `output`. The variables `unset` are not in its environment.
    """
    mark = uuid.uuid4().hex
    name = Path(str(command[0])).name
    python = [sys.executable, "-m", _MODULES[name]] if name in _MODULES else [sys.executable]
    environment = {**os.environ, **_ENVIRONMENT, _MARK: mark}
    process = subprocess.Popen(
        [*python, *map(str, command[1:])],
        cwd=cwd,
        env={name: value for name, value in environment.items() if name not in unset},
        text=True,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        _kill_marked(mark)
        with process:  # which closes its output and waits
            process.kill()


def output_of(
    command: Command, cwd: Path | None = None, *, timeout: float, fails: bool = False, unset: Sequence[str] = ()
) -> str:
    """What a program prints until it ends, which it must do in time, and with or without success as expected."""
    with started(command, cwd, unset=unset) as process:
        output, _ = process.communicate(timeout=timeout)
        assert (process.returncode != 0) == fails, output[-4000:]
        return output


def _kill_marked(mark: str) -> None:
    """Kill the processes that inherited the mark; torchrun puts each rank in a new session."""
    while processes := _marked(mark):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
