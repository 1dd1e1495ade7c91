"""Run a function in several processes that talk over gloo: a file store, one thread each, a timeout for the lot."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def launch(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` in `world_size` processes; what each returned, by rank.

    The first rank that raises ends them all, and its traceback is raised here; so does the timeout.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(function, rank, world_size, folder, args)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
                if failed:
                    time.sleep(0.5)
                    raise AssertionError(f"rank {failed[0]} failed:\n" + _error(folder, failed[0]))
                if time.monotonic() > deadline:
                    raise AssertionError(f"{world_size} ranks took more than {timeout} s")
                time.sleep(0.05)
            failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
            if failed:
                raise AssertionError(f"rank {failed[0]} failed:\n" + _error(folder, failed[0]))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _run(function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    os.environ.update(PYTHONWARNINGS="ignore")
    try:
        import torch

        torch.set_num_threads(1)
        if world_size > 1:
            store = torch.distributed.FileStore(f"{folder}/store", world_size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = function(*args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
        if world_size > 1:
            torch.distributed.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _error(folder: str, rank: int) -> str:
    path = Path(folder, f"error-{rank}")
    return path.read_text() if path.exists() else "it died without a traceback"
