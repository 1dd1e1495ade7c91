"""When a server is asked again, and how long is waited."""

from __future__ import annotations

import email.utils
import time

import pytest

from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.sources.transfer import persistence
from autotp_plan.sources.transfer.persistence import Again, Refused, Unreachable, asked_wait, check_status, persist


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    found: list[float] = []
    monkeypatch.setattr("autotp_plan.sources.transfer.persistence.time.sleep", found.append)
    return found


def test_what_a_server_asks_for() -> None:
    assert asked_wait({"Retry-After": "7"}) == 7
    date = asked_wait({"Retry-After": email.utils.formatdate(time.time() + 60, usegmt=True)})
    assert date is not None
    assert 55 < date <= 60
    assert asked_wait({"Retry-After": "Fri, 01 Jan 2021 00:00:00 GMT"}) == 0
    assert asked_wait({"RateLimit": '"api";r=0;t=55'}) == 56, "as the hub says it"
    assert asked_wait({"RateLimit": '"api";r=12;t=55'}) is None
    assert asked_wait({"Retry-After": "soon"}) is None
    assert asked_wait({}) is None


def test_it_waits_longer_each_time_and_gives_up(waits: list[float]) -> None:
    def fail() -> None:
        raise ConnectionResetError("reset")

    with pytest.raises(Unreachable, match="reset"):
        persist(fail, "a file")
    assert len(waits) == persistence.ATTEMPTS - 1
    assert all(2**n / 4 <= wait <= 2**n / 2 for n, wait in enumerate(waits[:5])), waits
    assert max(waits) <= persistence.LONGEST_WAIT


def test_what_brings_something_may_fail_forever(waits: list[float]) -> None:
    left = iter(range(50))

    def little_by_little() -> None:
        if next(left) < 49:
            raise Again("broke off", brought=True)

    persist(little_by_little, "a file")
    assert not waits


def test_the_wait_that_was_asked_for_is_kept_within_reason(waits: list[float]) -> None:
    answers = iter(["3", "100000"])

    def attempt() -> None:
        value = next(answers, None)
        if value is not None:
            check_status(429, "Too Many Requests", {"Retry-After": value})

    persist(attempt, "a file")
    assert waits == [3, persistence.LONGEST_ASKED_WAIT]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 501])
def test_what_is_refused_is_not_asked_again(waits: list[float], status: int) -> None:
    with pytest.raises(CheckpointError, match=str(status)):
        persist(lambda: check_status(status, "no", {}), "a file")
    with pytest.raises(Refused):
        check_status(status, "no", {})
    assert not waits
