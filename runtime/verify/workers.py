"""Processes of our own on this machine's CPU that talk over gloo: fresh, quiet, with a timeout, and never left behind.

They come from a fork server that has imported torch, transformers and DeepSpeed once, because eight ranks that import
them take half a minute on two cores. The process that asks for them imports none of it, and its output stays its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import AutoTPError

_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_PRELOAD = ["autotp_plan.runtime.training_plan", "transformers.models.llama.modeling_llama"]
_COLLECTIVE_SECONDS = 120


class ProcessError(Exception):
    """A process raised, died or took too long. The message says which, and what it said."""


def run_processes(
    function: Callable[..., None], world_size: int, folder: Path, *arguments: Any, timeout: float
) -> None:
    """`function(*arguments)` in `world_size` processes with a process group (none for a single one).

    What they print goes to files in `folder`. Raises the AutoTPError that one raised, or ProcessError; either ends all.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    context = _context()
    processes = [
        context.Process(target=_run, args=(function, rank, world_size, folder, name, arguments), daemon=True)
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                time.sleep(0.5)  # for the others to say what they know: the first to end is not always the cause
                break
            if time.monotonic() > deadline:
                raise ProcessError(f"{world_size} processes took more than {timeout:.0f} s{_held_locks()}")
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    if any(code != 0 for code in codes):
        raise _first_error(folder, name, codes)


def _held_locks() -> str:
    """What torch may have waited for: the lock file of a build outlives a build that was killed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    locks = ", ".join(str(lock) for lock in sorted(root.rglob("lock")))
    return f"; a build that was killed may have left its lock, remove it: {locks}" if locks else ""


def _first_error(folder: Path, name: str, codes: list[int | None]) -> Exception:
    """What the first process that failed said."""
    said = sorted(folder.glob(f"{name}.error-*"), key=lambda path: path.stat().st_mtime_ns)
    if not said:
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code not in (None, 0))
        return ProcessError(f"process {rank} died with exit status {code}")
    error: Exception = pickle.loads(said[0].read_bytes())
    return error


def _context() -> Any:
    """The fork server's context; starts the server, with our environment and nothing to print to, where need be."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
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


def _run(
    function: Callable[..., None], rank: int, world_size: int, folder: Path, name: str, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(_ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    log = os.open(folder / f"{name}.log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _work(function, rank, world_size, folder / f"{name}.store", arguments)
    except BaseException as error:
        known = error if isinstance(error, AutoTPError) else ProcessError(f"{type(error).__name__}: {error}")
        unfinished = folder / f"{name}.unfinished-{rank}"
        unfinished.write_bytes(pickle.dumps(known))
        unfinished.replace(folder / f"{name}.error-{rank}")
        os._exit(1)
    os._exit(0)  # without the time that interpreters take to end


def _work(function: Callable[..., None], rank: int, world_size: int, store: Path, arguments: tuple[Any, ...]) -> None:
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
    function(*arguments)
    if world_size > 1:
        torch.distributed.barrier()
