"""Ranks: what they return and raise, that each is a fresh process, and that none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotp_plan.runtime.verify.workers import RankError, run_ranks
from autotp_plan.schemas.errors import AutoTPError, Fault, MismatchError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

STATE: list[int] = []


def is_running(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_in(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def note_pid(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def summed(value: int) -> tuple[int, float, str]:
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    total = torch.tensor(float(value + rank))
    dist.all_reduce(total)
    return rank, total.item(), os.environ["RANK"]


def test_each_rank_returns_a_value() -> None:
    assert run_ranks(summed, 3, 10, timeout=100) == [(0, 33.0, "0"), (1, 33.0, "1"), (2, 33.0, "2")]


def change_state() -> tuple[int, str, int]:
    import torch

    before = len(STATE), os.environ.get("AUTOTP_LEFT_BEHIND", ""), torch.initial_seed()
    STATE.append(1)
    os.environ["AUTOTP_LEFT_BEHIND"] = "yes"
    torch.manual_seed(99)
    return before


def test_a_rank_sees_nothing_of_the_ranks_before_it() -> None:
    (first,) = run_ranks(change_state, 1, timeout=100)
    (second,) = run_ranks(change_state, 1, timeout=100)
    assert first == second and first[:2] == (0, "")


def hang(folder: Path) -> None:
    """Rank 1 never comes to the barrier that rank 0 waits at."""
    import torch.distributed as dist

    note_pid(folder)
    print("waiting", flush=True)
    if dist.get_rank() == 1:
        time.sleep(1000)


def test_ranks_that_hang_are_killed_in_time(tmp_path: Path) -> None:
    run_ranks(change_state, 1, timeout=100)  # not the start of the fork server
    started = time.monotonic()
    with pytest.raises(RankError, match="2 ranks took more than 4 s") as caught:
        run_ranks(hang, 2, tmp_path, timeout=4)
    assert time.monotonic() - started < 8
    assert "rank 1 printed:\nwaiting" in str(caught.value.__cause__)
    pids = pids_in(tmp_path)
    assert len(pids) == 2 and not any(is_running(pid) for pid in pids)


def refuse(folder: Path, kind: str) -> None:
    import torch.distributed as dist

    note_pid(folder)
    if dist.get_rank() == 1:
        if kind == "ours":
            raise MismatchError(Fault(what="wrong", where="here", got="1", expected="2", next="try 2"))
        if kind == "dies":
            os._exit(3)
        raise ValueError("not ours")
    dist.barrier()


def test_an_error_of_ours_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="wrong") as caught:
        run_ranks(refuse, 2, tmp_path, "ours", timeout=100)
    assert isinstance(caught.value, AutoTPError)
    assert "rank 1 raised" in str(caught.value.__cause__) and "in refuse" in str(caught.value.__cause__)
    assert not any(is_running(pid) for pid in pids_in(tmp_path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("raises", "^ValueError: not ours$"), ("dies", "^rank 1 died with exit status 3$")],
)
def test_a_rank_that_fails_ends_all_of_them(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(refuse, 2, tmp_path, kind, timeout=100)
    pids = pids_in(tmp_path)
    assert len(pids) == 2 and not any(is_running(pid) for pid in pids)


def leave() -> None:
    os._exit(0)


def test_a_rank_that_ends_without_a_result_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 ended without a result"):
        run_ranks(leave, 1, timeout=100)


def test_ranks_end_when_their_caller_is_killed(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from autotp_plan.runtime.verify.workers import run_ranks
from tests.runtime.verify.test_workers import hang
run_ranks(hang, 2, Path({str(tmp_path)!r}), timeout=100)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    try:
        while len(pids_in(tmp_path)) < 2:
            assert caller.poll() is None
            time.sleep(0.1)
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids_in(tmp_path)):
        assert time.monotonic() < deadline, "ranks of a caller that was killed are left behind"
        time.sleep(0.1)
