"""When a server is asked again, how long is waited before, and the faults of a server that gives no answer."""

from __future__ import annotations

import email.utils
import http.client
import random
import re
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from autotp_plan.schemas.errors import CheckpointError, Fault

ATTEMPTS = 7
"""How often in a row a request may bring nothing."""
FIRST_WAIT = 0.5
LONGEST_WAIT = 10.0
LONGEST_ASKED_WAIT = 330.0
"""Seconds. The hub counts requests over five minutes, and says when the next are free."""
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_RATE_LIMIT = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


class Headers(Protocol):
    """Those of an answer: names in any case."""

    def get(self, name: str, /) -> str | None:
        """The value of one; None where it is not there."""


class Refused(Exception):
    """A status that no repetition changes, and the headers of the answer."""

    def __init__(self, status: int, reason: str, headers: Headers) -> None:
        super().__init__(f"{status} {headers.get('X-Error-Message') or reason}".strip())
        self.status, self.headers = status, headers


class Again(Exception):
    """Why a request is made again.

    Attributes:
        wait: the seconds that the server asked to wait; None where it did not.
        brought: whether it brought something.
    """

    def __init__(self, why: object, wait: float | None = None, brought: bool = False) -> None:
        super().__init__(str(why) or type(why).__name__)
        self.wait, self.brought = wait, brought


class Unreachable(CheckpointError):
    """A server that did not answer, or broke off, as often as it was asked."""


Explain = Callable[[Refused], Fault | None]
"""The fault of an answer that no repetition changes; None for a general one."""


def persist(
    attempt: Callable[[], None], where: str, explain: Explain | None = None, attempts: int | None = None
) -> None:
    """Call `attempt` until it does not raise `Again`, an OSError or an HTTPException.

    Args:
        attempt: one request.
        where: what messages call what is fetched.
        explain: the fault of an answer that no repetition changes.
        attempts: how often in a row it may bring nothing; None for `ATTEMPTS`.

    Raises:
        CheckpointError: it was refused.
        Unreachable: it failed too often in a row.
    """
    failed = 0
    while True:
        try:
            attempt()
            return
        except Refused as refused:
            found = explain(refused) if explain else None
            raise CheckpointError(found or _refusal(where, refused)) from None
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(_unreachable(where, error)) from None
        except (Again, OSError, http.client.HTTPException) as error:
            again = error if isinstance(error, Again) else Again(error)
        failed = 0 if again.brought else failed + 1
        if failed >= (attempts or ATTEMPTS):
            raise Unreachable(_unreachable(where, again)) from None
        if again.wait is not None:
            time.sleep(min(again.wait, LONGEST_ASKED_WAIT))
        elif failed:
            time.sleep(min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0))


def check_status(status: int, reason: str, headers: Headers) -> None:
    """Raise what a status that is no success means: `Again`, or `Refused`."""
    if status in _AGAIN:
        raise Again(f"{status} {reason}", asked_wait(headers))
    if status >= 300:
        raise Refused(status, reason, headers)


def asked_wait(headers: Headers) -> float | None:
    """The seconds that an answer asks to wait: `Retry-After` in seconds or as a date, or the hub's `RateLimit`."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            pass
    limit = _RATE_LIMIT.search(headers.get("RateLimit") or "")
    return float(limit[1]) + 1.0 if limit else None


def _refusal(where: str, refused: Refused) -> Fault:
    if refused.status in (404, 410):
        return Fault(
            code="file-not-there",
            what="a file is not where it should be",
            where=where,
            got=str(refused),
            expected="the file",
            next="check the place, and that all files of the model were uploaded",
        )
    return Fault(
        code="access-refused",
        what="the server refuses access to a file",
        where=where,
        got=str(refused),
        expected="the file",
        next="check the credentials, and that they allow this file to be read",
    )


def _unreachable(where: str, error: Exception) -> Fault:
    return Fault(
        code="server-unreachable",
        what="a file cannot be fetched",
        where=where,
        got=str(error) or type(error).__name__,
        expected="a server that answers",
        next="check the network (proxies: HTTPS_PROXY), then run the command again",
    )
