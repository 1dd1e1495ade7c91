"""A file that stays open."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

from autotp_plan.schemas.storage.files import Reader, Span


class OpenFile:
    """A file that can be read when it has been removed, or when its path is that of another (a `StoredFile`).

    Args:
        path: where it is now.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    @property
    def name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def read_into(self, target: memoryview, spans: Sequence[Span], reader: Reader) -> None:
        for start, length in spans:
            while length:
                got = os.preadv(self._descriptor, [target[:length]], start)
                if got == 0:
                    raise EOFError(f"{self.path} ended {length} bytes early; it changed while it was read")
                target, start, length = target[got:], start + got, length - got
