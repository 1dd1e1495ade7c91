"""Ranks that live through many faults: started from a process that has imported everything, and given orders."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.job_faults import calls

_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
START_SECONDS = 180.0


STATES = ("one", "two", "three")
"""The states of a job: after its first step, its second, its third."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a job is set up: ranks, ZeRO stage, the folder of its checkpoint and plan, a seed, what is planted."""

    world_size: int
    zero_stage: int
    model: Path
    store: Path
    seed: int
    planted: str = ""


class Answer(NamedTuple):
    """What became of an order on one rank: `done`, `refused` (an error of ours), `raised`, `dead` or `hung`."""

    kind: str
    value: Any


class Server:
    """A process that forks ranks. Use it in a `with` block.

    Args:
        work: a folder for the library, the socket, and what ranks print.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.library = calls.build(work)
        self.address = str(work / "socket")

    def __enter__(self) -> Server:
        self.listener = Listener(self.address, "AF_UNIX")
        environment = {**os.environ, **_ENVIRONMENT, "LD_PRELOAD": str(self.library)}
        command = [sys.executable, "-m", __name__, self.address]
        with open(self.work / "output", "ab") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self.orders = self.listener.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.listener.close()

    def prepare(self, folder: Path) -> Path:
        """Write a small checkpoint and its plan to a new folder."""
        self.orders.send(folder)
        self.orders.recv()
        return folder

    def start(self, setting: Setting) -> Ranks:
        """Start the ranks of a job."""
        return Ranks(self, setting)


class Ranks:
    """The ranks of a job, from outside. Use it in a `with` block.

    Args:
        server: what forks them.
        setting: how the job is set up.
    """

    def __init__(self, server: Server, setting: Setting) -> None:
        self.setting = setting
        count = setting.world_size
        server.orders.send(setting)
        found = dict(self._hello(server.listener) for _ in range(count))
        self.connections: list[Connection] = [found[rank][0] for rank in range(count)]
        self.ids = [found[rank][1] for rank in range(count)]
        started = self._answers(range(count), START_SECONDS)
        assert all(answer.kind == "done" for answer in started.values()), f"the ranks did not start: {started}"

    @staticmethod
    def _hello(listener: Listener) -> tuple[int, tuple[Connection, int]]:
        connection = listener.accept()
        rank, process = connection.recv()
        return rank, (connection, process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for connection in self.connections:
            connection.close()

    def order(
        self, name: str, *arguments: Any, seconds: float, by_rank: Sequence[tuple[Any, ...]] = ()
    ) -> list[Answer]:
        """Give all ranks an order, and wait for what becomes of it.

        Args:
            name: a method of `rank.Rank`.
            arguments: the same for all ranks.
            seconds: a rank that has not answered then hangs.
            by_rank: further arguments of each rank.
        """
        self.give(name, *arguments, by_rank=by_rank)
        return self.answers(seconds)

    def give(self, name: str, *arguments: Any, by_rank: Sequence[tuple[Any, ...]] = ()) -> None:
        """Give all ranks an order."""
        for rank, connection in enumerate(self.connections):
            connection.send((name, (*arguments, *(by_rank[rank] if by_rank else ()))))

    def answers(self, seconds: float) -> list[Answer]:
        """What became of the order that was given."""
        found = self._answers(range(len(self.connections)), seconds)
        return [found[rank] for rank in range(len(self.connections))]

    def _answers(self, ranks: Sequence[int], seconds: float) -> dict[int, Answer]:
        waiting = {self.connections[rank]: rank for rank in ranks}
        deadline = time.monotonic() + seconds
        found = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    found[rank] = Answer(*connection.recv())
                except (EOFError, ConnectionError):
                    found[rank] = Answer("dead", "")
        return {**found, **{rank: Answer("hung", "") for rank in waiting.values()}}


def _serve(address: str) -> None:
    """Fork ranks, until whoever asked for them has ended."""
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    for name in (
        "deepspeed.runtime.engine",
        "deepspeed.runtime.zero.stage3",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)

    from benchmarks.job_faults import rank
    from tests.helpers import parity  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    orders = Client(address, "AF_UNIX")
    while True:
        setting = orders.recv()
        if isinstance(setting, Path):
            _prepare(setting)
            orders.send("done")
            continue
        for number in range(setting.world_size):
            if os.fork() == 0:
                orders.close()
                ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                connection = Client(address, "AF_UNIX")
                connection.send((number, os.getpid()))
                try:
                    rank.run(setting, number, connection)
                finally:
                    os._exit(1)


def _prepare(folder: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    save_checkpoint(folder, "llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=64)
    (folder / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())


def new_store(work: Path) -> Path:
    """A file through which the ranks of a job find each other."""
    return work / f"store-{secrets.token_hex(4)}"


if __name__ == "__main__":
    try:
        _serve(sys.argv[1])
    except EOFError:
        sys.exit()
