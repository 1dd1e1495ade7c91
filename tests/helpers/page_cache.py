"""Files in the page cache and out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autotp_plan.schemas.storage.uncached import _OpenFile


def is_cached(path: Path) -> bool:
    """Whether most of a file is in the page cache."""
    opened = _OpenFile(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return opened.is_cached(0, path.stat().st_size)
    finally:
        opened.close()


def cold(*paths: Path) -> None:
    """Take files out of the page cache; skip the test where their file system does not do it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        try:
            if not is_cached(path):
                continue
        except OSError:
            pass
        pytest.skip("the file system of temporary files has no way past its cache")
