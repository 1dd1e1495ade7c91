"""What a rank does: it holds an engine, and carries out orders: go to a state, save, load, each with a disturbance.

A state is known by a digest of all that a job resumes: weights, optimizer, scheduler, counters, random streams.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from autotp_plan.runtime import load_plan
from autotp_plan.schemas.errors import AutoTPError
from benchmarks.job_faults import calls, planted
from benchmarks.job_faults.calls import Disturbance
from benchmarks.job_faults.ranks import Setting

HANG_SECONDS = 600
"""A collective of ours waits longer than any order is waited for, so that no hang ends by itself."""


def run(setting: Setting, rank: int, orders: Connection) -> None:
    """Carry out orders until there are none any more."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setting.world_size))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(setting.store), setting.world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=setting.world_size,
        timeout=timedelta(seconds=HANG_SECONDS),
    )
    planted.plant(setting.planted)
    rank_of_job = Rank(setting)
    orders.send(("done", None))
    while True:
        try:
            name, arguments = orders.recv()
        except EOFError:
            return
        try:
            orders.send(("done", getattr(rank_of_job, name)(*arguments)))
        except AutoTPError as error:
            ended = error.faults[0].code == "rank-ended"
            orders.send(("raised" if ended else "refused", str(error)))
            if ended:
                return
        except Exception as error:
            orders.send(("raised", f"{type(error).__name__}: {error}"))
            return  # a script ends there, and the other ranks see that


class Rank:
    """A rank of a job. Its public methods are the orders."""

    def __init__(self, setting: Setting) -> None:
        from tests.helpers import parity

        self.plan = load_plan(setting.model / "plan.json")
        torch.manual_seed(setting.seed)
        model = self.plan.load_model(setting.model, check_batches_every=None).train()
        self.engine, *_ = self.plan.initialize(model, config=parity.engine_settings(setting.zero_stage))
        self.steps = 0
        self.seed = setting.seed

    def step(self) -> str:
        """Train a step; returns the digest of the state."""
        self.steps += 1
        seed = 1000 * self.seed + 10 * self.steps + self.plan.ranks.dp_rank
        ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(seed))
        self.engine.backward(self.engine(input_ids=ids, labels=ids, use_cache=False).loss)
        self.engine.step()
        torch.rand(self.steps)
        return self.digest()

    def save(
        self, folder: Path, tag: str, what: Disturbance, processes: Sequence[int], log: Path | None, root: Path
    ) -> int:
        """Save a checkpoint; returns the number of file calls."""
        with _disturbed(root, what, processes, log) as count:
            self.plan.save_checkpoint(self.engine, folder, tag, {"steps": self.steps})
        return count[0]

    def load(self, folder: Path, tag: str | None, what: Disturbance, processes: Sequence[int]) -> tuple[str, int]:
        """Load a checkpoint; returns the digest of the state, and the number of file calls."""
        before = self.digest()
        count = [0]
        try:
            with _disturbed(folder, what, processes, None) as count:
                self.steps = self.plan.load_checkpoint(self.engine, folder, tag)["steps"]
        except AutoTPError as error:
            if what.action == "nothing" and self.digest() != before:
                raise RuntimeError("CHANGED although it was refused") from error
            raise
        return self.digest(), count[0]

    def save_shards(
        self, folder: Path, what: Disturbance, processes: Sequence[int], log: Path | None, root: Path
    ) -> int:
        """Save the weights as shards."""
        with _disturbed(root, what, processes, log) as count:
            self.plan.save_shards(self.engine, folder)
        return count[0]

    def save_pretrained(
        self, folder: Path, what: Disturbance, processes: Sequence[int], log: Path | None, root: Path
    ) -> int:
        """Save the weights as transformers does, in several files."""
        with _disturbed(root, what, processes, log) as count:
            self.engine.module.save_pretrained(folder, max_shard_size="8KB")
        return count[0]

    def without_locks(self, error: int) -> None:
        """From now on the file system knows no locks; 0 for one that does."""
        calls.leave_out(lock_error=error)

    def release(self, folder: Path) -> None:
        """Give a folder's lock back: another job goes on with it."""
        from autotp_plan.schemas.jobs.job_lock import release

        release(folder)

    def digest(self) -> str:
        """Of all that a job resumes."""
        found = hashlib.blake2b(digest_size=16)
        for name, parameter in self.engine.module.named_parameters():
            _add(found, name)
            _add(found, getattr(parameter, "ds_tensor", parameter).detach())
        for name, buffer in self.engine.module.named_buffers():
            _add(found, [name, buffer])
        engine = self.engine
        _add(found, engine.optimizer.state_dict())
        _add(found, [engine.global_steps, engine.global_samples, engine.skipped_steps])
        _add(found, [torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()])
        return found.hexdigest()


@contextlib.contextmanager
def _disturbed(root: Path, what: Disturbance, processes: Sequence[int], log: Path | None) -> Iterator[list[int]]:
    """While active, file calls below `root` are counted, logged and disturbed; yields a list that gets their number."""
    count = [0]
    calls.log_to(log)
    calls.arm(root, what, processes)
    try:
        yield count
    finally:
        count[0] = calls.disarm()
        calls.log_to(None)


def _add(digest: Any, value: Any) -> None:
    """Add a value to a digest, with its type, and lists and dicts with all that is in them."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        digest.update(value.tobytes())
    elif isinstance(value, dict):
        for key, one in value.items():
            _add(digest, str(key))
            _add(digest, one)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _add(digest, one)
    elif hasattr(value, "__dict__"):
        _add(digest, vars(value))
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())
