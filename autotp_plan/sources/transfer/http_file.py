"""A file on a web server, read by ranges straight into memory."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autotp_plan.schemas.storage.files import Reader, Span
from autotp_plan.sources.transfer.http_connections import answer, same_host
from autotp_plan.sources.transfer.in_flight import fetch_spans
from autotp_plan.sources.transfer.persistence import Again, Explain, Refused, check_status, persist

TIMEOUT = 30.0
READ_BYTES = 1024 * 1024
"""What is lost at most when a connection breaks."""
MOST_SKIPPED = 16 * 1024 * 1024
"""Of a server that answers with all of a file where a range of it was asked for."""
_EXPIRED = frozenset({400, 401, 403, 404, 410})


@dataclass(eq=False, kw_only=True)
class HttpFile:
    """A file on a web server.

    Attributes:
        name: its name in its folder.
        size: bytes.
        url: where it is asked for. Where that redirects to is remembered, until it is refused there.
        where: what messages call it.
        headers: sent to the host of `url` alone.
        timeout: seconds without an answer, or without a byte.
        explain: the fault of an answer that no repetition changes.
    """

    name: str
    size: int
    url: str
    where: str
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = TIMEOUT
    explain: Explain | None = None
    _moved_to: str | None = field(default=None, init=False)

    def __str__(self) -> str:
        return self.where

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        """As `StoredFile.read_into`. Raises CheckpointError for what a server refuses, or never answers."""
        fetch_spans(target, spans, self._fetch)

    def _fetch(self, start: int, target: memoryview) -> None:
        if start + len(target) > self.size:
            raise EOFError(f"{self} has {self.size} bytes, and bytes up to {start + len(target)} are asked for")
        done = 0

        def read_on() -> None:
            nonlocal done
            before = done
            try:
                for done in self._arriving(start, target, before):  # noqa: B007 (it is read where this fails)
                    pass
            except ssl.SSLCertVerificationError:
                raise
            except (OSError, http.client.HTTPException) as error:
                raise Again(error, brought=done > before) from None

        persist(read_on, self.where, self.explain)

    def _arriving(self, start: int, target: memoryview, done: int) -> Iterator[int]:
        """Fill `target` from byte `done` on; yields up to where it is filled."""
        moved_to = self._moved_to
        wanted = {"Range": f"bytes={start + done}-{start + len(target) - 1}"}
        headers = {**self.headers, **wanted} if same_host(moved_to or self.url, self.url) else wanted
        with answer(moved_to or self.url, headers, timeout=self.timeout) as (response, url):
            if url != self.url and response.status in _EXPIRED:  # a signed link holds for an hour or so
                self._moved_to = None
                raise Again(f"{response.status} for a link that was given", 0.0 if moved_to else None)
            check_status(response.status, response.reason, response.headers)
            self._check_range(response, start + done, start + len(target))
            self._moved_to = url if url != self.url else None
            while done < len(target):
                count = response.readinto(target[done : done + READ_BYTES])
                if not count:
                    raise http.client.HTTPException("the connection broke off")
                done += count
                yield done

    def _check_range(self, response: http.client.HTTPResponse, start: int, stop: int) -> None:
        """Make sure that bytes `start` to `stop` of the file are what follows."""
        if response.status == 206:
            got = (response.getheader("Content-Range") or "").removeprefix("bytes ").strip()
            if got not in (f"{start}-{stop - 1}/{self.size}", f"{start}-{stop - 1}/*"):
                raise Refused(206, f"bytes {got}, where {start}-{stop - 1}/{self.size} were asked for", {})
            return
        if self.size > MOST_SKIPPED or response.getheader("Content-Length") != str(self.size):
            raise Refused(response.status, "the server does not answer requests for ranges of a file", {})
        skipped = memoryview(bytearray(start))
        while skipped:
            count = response.readinto(skipped)
            if not count:
                raise http.client.HTTPException("the connection broke off")
            skipped = skipped[count:]
