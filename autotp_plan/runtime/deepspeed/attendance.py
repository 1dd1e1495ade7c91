"""Whether all ranks make a call that needs all of them, asked before its first collective.

A call on one rank alone (`if rank == 0: model.save_pretrained(folder)`) would wait in that collective until the process
group gives up, after half an hour, with an error that names no call. So the ranks first announce the call in the store
of the process group.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed
from deepspeed.utils import logger

from autotp_plan.runtime.deepspeed.store_internals import store_of_all_ranks
from autotp_plan.schemas.errors import Fault, MismatchError

SECONDS = 60.0
"""How long a rank waits for the others."""

SECONDS_FOR_FIRST = 900.0
"""How long it waits for the first rank, which often uploads or writes something alone."""

ON_EVERY_RANK = "call it on every rank, not under `if rank == 0` or `if is_main_process`"

_GAVE_UP = "gave up "

_made: Counter[str] = Counter()
"""By group, how many calls all of its ranks have made."""


SECONDS_AFTER_FAILURE = 30.0
"""How long a rank may go on with a call in which another has failed, before it ends."""

_LOOKS = 0.5
"""Seconds between two looks at the store."""

_calls_watched: Counter[str] = Counter()


class Watch:
    """One call that all ranks make, in which they wait for each other.

    Args:
        store: of all ranks; None where there is one.
        key: of this call.
        what: what could not be done, when a rank fails.
    """

    def __init__(self, store: Any, key: str, what: str) -> None:
        self._store, self._key, self._what = store, key, what
        self._over = threading.Event()

    def tell(self, reason: str) -> None:
        """Tell the other ranks that this one has failed, and why."""
        if self._store is not None:
            self._store.set(self._key, f"rank {torch.distributed.get_rank()}: {reason}")

    def end(self) -> None:
        """The call is over, on this rank."""
        self._over.set()

    def look(self) -> None:
        """Until the call is over: see whether a rank has failed, and if so end this process when it does not."""
        while not self._over.wait(_LOOKS):
            try:
                reason = self._store.get(self._key).decode() if self._store.check([self._key]) else ""
            except RuntimeError:  # the rank that holds the store has ended: the collective will say so
                return
            if reason and not self._over.wait(SECONDS_AFTER_FAILURE):
                os.write(2, f"error: {self._what}: a rank failed that this one waits for\n{reason}\n".encode())
                os._exit(1)


@contextmanager
def watched(what: str) -> Iterator[Watch]:
    """While active, this rank ends when another has failed and it waits for that one; every rank enters it.

    A collective that waits cannot be interrupted, over gloo or NCCL.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield Watch(None, "", what)
        return
    _calls_watched[what] += 1
    watch = Watch(store_of_all_ranks(), f"autotp_plan/failed/{what}/{_calls_watched[what]}", what)
    thread = threading.Thread(target=watch.look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.end()
        thread.join()


def check_all_call(call: str, next_step: str = ON_EVERY_RANK, group: Any = None, seconds: float | None = None) -> None:
    """Check that every rank of the group makes this call. Nothing is sent from device to device.

    Args:
        call: what is called, as people write it: `model.save_pretrained`.
        next_step: what to write instead.
        group: a process group; None for all ranks.
        seconds: how long a rank waits for the others; None for a minute.

    Raises:
        MismatchError: a rank did not make the call in that time, or the first rank in 15 minutes.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return
    here, ranks = torch.distributed.get_rank(), torch.distributed.get_process_group_ranks(group)
    name = f"autotp_plan/calls of {','.join(map(str, ranks))}"
    store, prefix, before = store_of_all_ranks(), f"{name}/{_made[name]}", f"{name}/{_made[name] - 1}"
    store.set(f"{prefix}/{here}", call)
    if store.add(f"{prefix}/number of {call}", 1) == len(ranks):
        store.set(f"{prefix}/all", call)
    seconds = SECONDS if seconds is None else seconds
    if not _wait(store, f"{prefix}/all", seconds):
        calls = _calls(store, prefix, ranks, call)
        if [rank for rank in ranks if not calls[rank]] == ranks[:1]:
            logger.warning(f"{call} waits for rank {ranks[0]}")
            _wait(store, f"{prefix}/all", max(0.001, SECONDS_FOR_FIRST - seconds))
            calls = _calls(store, prefix, ranks, call)
        if not store.check([f"{prefix}/all"]):
            store.set(f"{prefix}/{here}", _GAVE_UP + call)
            store.add(f"{prefix}/number of {call}", -1)  # so that it may be tried again
            raise MismatchError(_fault(call, next_step, calls))
    _made[name] += 1
    store.delete_key(f"{before}/{here}")  # all ranks have gone on from there
    if here == ranks[0] and store.check([f"{before}/all"]):
        store.delete_key(f"{before}/number of {store.get(f'{before}/all').decode()}")
        store.delete_key(f"{before}/all")


def _wait(store: Any, key: str, seconds: float) -> bool:
    """Whether `key` is set in time."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:  # torch has no error of its own for it in all its versions
        return False
    return True


def _calls(store: Any, prefix: str, ranks: list[int], call: str) -> dict[int, str]:
    """What each rank calls now; empty where it calls nothing, or has given up another call than this one."""
    found = {}
    for rank in ranks:
        key = f"{prefix}/{rank}"
        announced = store.get(key).decode() if store.check([key]) else ""
        if announced == _GAVE_UP + call:
            announced = call
        found[rank] = "" if announced.startswith(_GAVE_UP) else announced
    return found


def _fault(call: str, next_step: str, calls: dict[int, str]) -> Fault:
    by_call: dict[str, list[int]] = {}
    for rank, called in calls.items():
        by_call.setdefault(called, []).append(rank)
    got = [f"{_named(by_call.pop(call))} called it"]
    absent = by_call.pop("", [])
    if absent:
        got.append(f"{_named(absent)} did not")
    got += [f"{_named(others)} called {other}" for other, others in by_call.items()]
    return Fault(
        code="not-on-every-rank",
        what="not every rank makes a call that needs all of them",
        where=call,
        got="; ".join(got),
        expected=f"the same call on {_named(list(calls))}: each holds a part of what it needs",
        next=next_step,
    )


def _named(ranks: list[int], most: int = 16) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks[:most]))}{more}"
