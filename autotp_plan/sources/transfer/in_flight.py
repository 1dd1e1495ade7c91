"""Reading many spans of a file far away by few long requests, several of them in flight.

Spans that nearly touch are fetched as one block: a request costs as much time as megabytes do. Long ones are fetched in
pieces, so that all connections have work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from autotp_plan.schemas.storage.files import Span

CONNECTIONS = 16
PIECE_BYTES = 8 * 1024 * 1024
GAP_BYTES = 128 * 1024

Fetch = Callable[[int, memoryview], None]
"""Fills memory with the bytes of a file from a position on."""


class Part(NamedTuple):
    """Bytes of a piece that are asked for: where they begin in it, and where they are wanted."""

    start: int
    target: memoryview


class Piece(NamedTuple):
    """Bytes that are fetched by one request."""

    start: int
    length: int
    parts: tuple[Part, ...]


def pieces(target: memoryview, spans: Sequence[Span]) -> Iterator[Piece]:
    """What is fetched to fill `target` with `spans`, one after the other."""
    begin = end = -1
    parts: list[Part] = []
    for start, length in spans:
        while length:
            gap = start - end
            count = min(length, PIECE_BYTES)
            if not parts or not 0 <= gap <= GAP_BYTES or start + count - begin > PIECE_BYTES:
                if parts:
                    yield Piece(begin, end - begin, tuple(parts))
                begin, parts = start, []
            parts.append(Part(start - begin, target[:count]))
            target, end = target[count:], start + count
            start, length = start + count, length - count
    if parts:
        yield Piece(begin, end - begin, tuple(parts))


def fetch_spans(target: memoryview, spans: Sequence[Span], fetch: Fetch) -> None:
    """Fill `target` with `spans`, one after the other. Raises what `fetch` raises first."""
    found = list(pieces(target, spans))
    if len(found) == 1:
        _fetch_piece(found[0], fetch)
        return
    _settle([_staff().submit(_fetch_piece, piece, fetch) for piece in found])


def _fetch_piece(piece: Piece, fetch: Fetch) -> None:
    if len(piece.parts) == 1 and len(piece.parts[0].target) == piece.length:
        fetch(piece.start, piece.parts[0].target)
        return
    block = memoryview(bytearray(piece.length))
    fetch(piece.start, block)
    for start, target in piece.parts:
        target[:] = block[start : start + len(target)]


def _settle(futures: Sequence[Future[None]]) -> None:
    """Wait for all, so that nobody writes to memory that was given back; then raise what the first to fail raised."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()
        raise


_pools: dict[int, ThreadPoolExecutor] = {}


def _staff() -> ThreadPoolExecutor:
    """The threads of this process; a forked one gets its own."""
    pool = _pools.get(os.getpid())
    if pool is None:
        pool = _pools.setdefault(os.getpid(), ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch"))
    return pool
