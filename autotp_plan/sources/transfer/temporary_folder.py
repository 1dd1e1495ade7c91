"""A folder for the small files of a model that lies elsewhere. It is removed when the process ends, and not before."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FETCHES = 8


class TemporaryFolder:
    """A folder that is there until the process ends: whoever was given its path may use it.

    Args:
        fetch: gives the contents of a file by its name; None where there is none.

    Attributes:
        path: its path.
    """

    def __init__(self, fetch: Callable[[str], bytes | None]) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="autotp-plan-"))
        self._fetch = fetch
        atexit.register(shutil.rmtree, self.path, ignore_errors=True)

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch files that are not there yet."""
        missing = [name for name in names if not (self.path / name).exists()]
        with ThreadPoolExecutor(_FETCHES) as pool:
            for name, content in zip(missing, pool.map(self._fetch, missing)):
                if content is not None:
                    (self.path / name).write_bytes(content)
