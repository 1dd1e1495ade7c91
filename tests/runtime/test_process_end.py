"""A process that has communicated over gloo ends with status 0, also where gloo's threads are slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import slow_gloo

JOB = """
import atexit, ctypes, sys
atexit.register(ctypes.PyDLL(None).usleep, 900_000)  # the last thing to happen, with Python's lock: as a slow exit
import torch, torch.distributed as dist
from autotp_plan.runtime.deepspeed.process_end import wait_for_gloo_at_exit

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "waits":
    wait_for_gloo_at_exit()
group = dist.group.WORLD  # held until the end, as DeepSpeed and an engine hold theirs
dist.all_reduce(torch.ones(4))
ctypes.CDLL(None).be_slow(ctypes.c_double(0.4))
dist.all_reduce(torch.ones(4))
dist.destroy_process_group()
print("done", flush=True)
"""


@pytest.mark.skipif(slow_gloo.compiler() is None, reason="needs a C compiler")
def test_a_process_waits_for_threads_of_gloo_before_it_ends(tmp_path: Path) -> None:
    library = slow_gloo.build(tmp_path)
    for waits, status, said in (
        ("waits", 0, ""),
        ("goes", -signal.SIGABRT, "terminate called without an active exception"),
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", JOB, waits], env={**os.environ, "LD_PRELOAD": str(library)},
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert (done.stdout, done.stderr.strip(), done.returncode) == ("done\n", said, status)
