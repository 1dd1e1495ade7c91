"""Ranks on the CPU of this machine: fresh processes that talk over gloo, with a timeout, none of them left behind.

They are forked from a server that has imported torch, transformers and DeepSpeed once, because eight processes that
import them take half a minute on two cores. The caller imports none of it, and what the ranks print goes to files.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autotp_plan.schemas.errors import AutoTPError

_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_PRELOAD = ("autotp_plan.runtime.training_plan", "transformers.models.llama.modeling_llama")
_COLLECTIVE_SECONDS = 120
_OUTPUT_BYTES = 4000


class RankError(Exception):
    """A rank raised, died or took too long. The message says which rank, and what it raised."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float, preload: Sequence[str] = ()
) -> list[Any]:
    """Run `function(*arguments)` on every rank of a new process group; on a single rank without a group.

    Args:
        function: importable by its name; it, its arguments and what it returns are pickled.
        world_size: number of ranks.
        *arguments: the same for every rank.
        timeout: seconds after which all ranks are killed; a collective is given up after 120 s in any case.
        preload: more modules to import before forking. Only the first call in a process can add any.

    Returns:
        What each rank returned, by rank.

    Raises:
        AutoTPError: the one that a rank raised.
        RankError: for any other exception of a rank, a rank that died, and the timeout.

    The first rank that fails ends all of them. The exception's cause holds the rank's traceback and its last output.
    """
    context = _context(preload)
    with tempfile.TemporaryDirectory(prefix="autotp-ranks-") as name:
        folder = Path(name)
        processes = [
            context.Process(target=_run, args=(function, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            _wait(processes, deadline)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if any(codes):
            _raise_first_error(folder, codes)
        if None in codes:
            raise RankError(f"{world_size} ranks took more than {timeout:.0f} s{_held_locks()}") from RankError(
                "\n".join(f"rank {rank} printed:\n{_output(folder, rank)}" for rank in range(world_size))
            )
        return [_result(folder, rank) for rank in range(world_size)]


def _wait(processes: Sequence[Any], deadline: float) -> None:
    """Until all have ended, one has failed, or the time is over."""
    while running := [process.sentinel for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            time.sleep(0.5)  # for the others to report: the first rank to end is not always the cause
            return
        if time.monotonic() > deadline:
            return
        multiprocessing.connection.wait(running, timeout=max(0.0, deadline - time.monotonic()))


def _held_locks() -> str:
    """What torch may have waited for: the lock file of a build outlives a build that was killed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    locks = ", ".join(str(lock) for lock in sorted(root.rglob("lock")))
    return f"; a build that was killed may have left its lock, remove it: {locks}" if locks else ""


def _raise_first_error(folder: Path, codes: Sequence[int | None]) -> NoReturn:
    """The first error that a rank wrote; but a rank that died without one is why the others failed."""
    written = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    reported = {int(path.name.removeprefix("error-")) for path in written}
    for rank, code in enumerate(codes):
        if code and rank not in reported:
            raise RankError(f"rank {rank} died with exit status {code}") from RankError(_output(folder, rank))
    error, trace = pickle.loads(written[0].read_bytes())
    rank = int(written[0].name.removeprefix("error-"))
    raise error from RankError(f"rank {rank} raised:\n{trace}\nand printed:\n{_output(folder, rank)}")


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result-{rank}"
    if not path.exists():
        raise RankError(f"rank {rank} ended without a result") from RankError(_output(folder, rank))
    return pickle.loads(path.read_bytes())


def _output(folder: Path, rank: int) -> str:
    path = folder / f"output-{rank}"
    return path.read_bytes()[-_OUTPUT_BYTES:].decode(errors="replace") if path.exists() else ""


def _context(preload: Sequence[str]) -> Any:
    """The context of the fork server, which is started, if need be, with our environment and nowhere to print to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, *preload])
    with _environment(), _silence():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A process started meanwhile prints to nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, nowhere):
            os.close(descriptor)


def _run(function: Callable[..., Any], rank: int, world_size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    """What a rank's process does. It leaves without the time that an interpreter takes to end."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    os.environ.update(_ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        result = _call(function, rank, world_size, folder / "store", arguments)
        _write(folder / f"result-{rank}", result)
    except BaseException as error:
        known = error if isinstance(error, AutoTPError) else RankError(f"{type(error).__name__}: {error}")
        _write(folder / f"error-{rank}", (known, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def _end_with_caller() -> None:
    """A rank whose caller was killed ends at once, not when its collectives time out."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    multiprocessing.connection.wait([caller.sentinel])
    os._exit(1)


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.replace(path)


def _call(function: Callable[..., Any], rank: int, world_size: int, store: Path, arguments: tuple[Any, ...]) -> Any:
    import datetime

    import torch

    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(str(store), world_size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=_COLLECTIVE_SECONDS),
        )
    result = function(*arguments)
    if world_size > 1:
        torch.distributed.barrier()
    return result
