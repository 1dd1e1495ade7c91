"""The checks of `make gpu`, on CPU: they run, and they notice what is wrong."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.programs import output_of

COMMAND = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--hidden", "64", "--layers", "1"]


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_the_checks_run_on_cpu() -> None:
    chosen = [
        "float64 phi3",
        "float64 planted",
        "engine phi3 ZeRO 1",
        "large loading",
        "save_pretrained",
        "estimate ZeRO 1",
    ]
    page = output_of([*COMMAND, *(word for name in chosen for word in ("--only", name))], timeout=200)
    assert "6 checks in" in page and "0 failed" in page
    assert all(f"| {name}" in page for name in chosen)
