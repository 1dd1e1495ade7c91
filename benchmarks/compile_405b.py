"""python -m benchmarks.compile_405b [--runs 5]

CPU time and plan size of compiling a checkpoint of Llama-3.1-405B: 1137 tensors in 191 files, 812 GB that are not there
(sparse files with real headers). The command is the one a user types, in a process of its own, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.sparse import llama_tensors, write_sparse_checkpoint

ROOT = Path(__file__).parent.parent
TARGET_CPU_SECONDS = 0.5
TARGET_PLAN_BYTES = 64 * 1024
PROBE = (
    "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules));"
    "from autotp_plan.planner.cli.main import main; main()"
)


def write_405b(folder: Path) -> int:
    """Llama-3.1-405B as on the hub: the config of the 8B model with other sizes."""
    config = json.loads((ROOT / "autotp_plan/plans/llama_3_1_8b/config.json").read_text())
    config.update(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128)
    return write_sparse_checkpoint(folder, config, llama_tensors(config), num_files=191)


def run(arguments: list[str]) -> tuple[float, float]:
    """CPU (user and system) and wall seconds of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder, plan = Path(name) / "checkpoint", Path(name) / "plan.json"
        folder.mkdir()
        total = write_405b(folder)
        arguments = ["compile", "--model", str(folder), "--tp", "8", "-o", str(plan)]
        command = [str(Path(sys.executable).with_name("autotp-plan")), *arguments]
        run(command)  # writes .pyc files, fills caches
        bare = [run([sys.executable, "-c", "pass"]) for _ in range(runs)]
        times = [run(command) for _ in range(runs)]
        probe = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
        torch_imported = {"True": True, "False": False}[probe.stdout.split()[-1]]
        size = plan.stat().st_size
    cpu = statistics.median(cpu for cpu, _ in times)
    print(f"checkpoint                  {total / 1e9:.0f} GB of tensors in 191 files")
    print(f"CPU seconds of the process  {' '.join(f'{cpu:.2f}' for cpu, _ in times)}, median {cpu:.2f}")
    print(f"  of it Python's own start  {statistics.median(cpu for cpu, _ in bare):.2f}")
    print(f"wall seconds                {' '.join(f'{wall:.2f}' for _, wall in times)}")
    print(f"target: at most {TARGET_CPU_SECONDS} CPU s    {'met' if cpu <= TARGET_CPU_SECONDS else 'MISSED'}")
    print(f"plan                        {size} bytes")
    print(f"target: at most {TARGET_PLAN_BYTES} bytes  {'met' if size <= TARGET_PLAN_BYTES else 'MISSED'}")
    print(f"torch was imported          {'yes: MISSED' if torch_imported else 'no'}")


if __name__ == "__main__":
    main()
