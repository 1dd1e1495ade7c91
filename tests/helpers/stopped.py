"""A command that ends in the middle, when so many files are complete."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from autotp_plan.schemas.errors import OutputError


def stopped(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """Run a command, which ends when so many files are complete."""
    real, done = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done > files:
            raise OSError(errno.EIO, "stopped")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OutputError, match="stopped"):
            run()
