"""What holds for every distributed test: a timeout of its own, and DeepSpeed's shared-memory operator is built before.

torch guards a build by a lock file that outlives a killed build, and whoever comes next waits for it without end. So
the tests share no build folder with anyone, and a build that does not finish ends the run, instead of every test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("without a deadline", deadline=None)  # machines are shared, and noisy
hypothesis.settings.load_profile("without a deadline")

BUILD_SECONDS = 240

EXTENSIONS = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist, files with long timeouts first: so that no process waits for the last file of another one."""
    if not hasattr(config, "workerinput"):
        return
    longest: dict[Path, float] = defaultdict(float)
    for item in items:
        marker = item.get_closest_marker("timeout")
        longest[item.path] = max(longest[item.path], marker.args[0] if marker else 0.0)
    items.sort(key=lambda item: -longest[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("distributed") is None:
        return
    if item.get_closest_marker("timeout") is None:
        pytest.fail("a distributed test needs pytest.mark.timeout", pytrace=False)
    if problem := build_shared_memory_operator():
        item.session.shouldfail = problem
        pytest.fail(problem, pytrace=False)


@cache
def build_shared_memory_operator() -> str:
    """Why it cannot be built; empty when it is there."""
    if list(EXTENSIONS.rglob("deepspeed_shm_comm*.so")):
        return ""
    build = [sys.executable, "-W", "ignore", "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    try:
        subprocess.run(build, check=True, timeout=BUILD_SECONDS, capture_output=True, text=True, env=environment)
    except subprocess.TimeoutExpired:
        locks = ", ".join(str(lock) for lock in EXTENSIONS.rglob("lock")) or "none"
        return f"DeepSpeed's build took more than {BUILD_SECONDS} s; locks to remove: {locks}"
    except subprocess.CalledProcessError as error:
        return f"DeepSpeed's build failed:\n{error.stdout}\n{error.stderr}"
    return ""
