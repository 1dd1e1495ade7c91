"""Before the first rank starts: every distributed test has a timeout, and DeepSpeed's shared-memory operator is built.

torch guards a build by a lock file that outlives a killed build, and whoever comes next waits for it without end. So
the tests share no build folder with anyone, and a build that does not finish ends the run, instead of every test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD_SECONDS = 240

EXTENSIONS = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")))


def pytest_collection_finish(session: pytest.Session) -> None:
    distributed = [item for item in session.items if item.get_closest_marker("distributed")]
    if session.config.option.collectonly or not distributed:
        return
    without = sorted(item.nodeid for item in distributed if item.get_closest_marker("timeout") is None)
    if without:
        raise pytest.UsageError("distributed tests without pytest.mark.timeout: " + ", ".join(without))
    if not list(EXTENSIONS.rglob("deepspeed_shm_comm*.so")):
        build_shared_memory_operator()


def build_shared_memory_operator() -> None:
    build = [sys.executable, "-W", "ignore", "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    try:
        subprocess.run(build, check=True, timeout=BUILD_SECONDS, capture_output=True, text=True, env=environment)
    except subprocess.TimeoutExpired:
        locks = ", ".join(str(lock) for lock in EXTENSIONS.rglob("lock")) or "none"
        pytest.exit(f"DeepSpeed's build took more than {BUILD_SECONDS} s; locks to remove: {locks}", returncode=2)
    except subprocess.CalledProcessError as error:
        pytest.exit(f"DeepSpeed's build failed:\n{error.stdout}\n{error.stderr}", returncode=2)
