"""python -m benchmarks.gpu [--device cuda|cpu] [--only NAME] [--hidden 4096] [--layers 32] [--output docs/gpu.md]

What holds on CPU, on a GPU: the sharded model against the unsharded one, on the same card. Two TP ranks share one card
and talk over gloo, because NCCL refuses two ranks of one device; so this says what is right, not how fast it is. Writes
a page, and ends with 1 when anything differs. `--device cpu` tries the program itself on a machine without a card.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import hybrids, programs
from benchmarks.gpu.report import page

RANKS = 2
LOAD = "load"
OPERATORS = (
    "import torch; from deepspeed.ops import op_builder;"
    "op_builder.FusedAdamBuilder().load(); op_builder.CPUAdamBuilder().load()"
)
CAPABILITY = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", action="append", help="run the checks whose name begins so; may be given again")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the model that is loaded and timed")
    parser.add_argument("--layers", type=int, default=32, help="its layers")
    parser.add_argument("--seconds", type=float, default=480, help="the ranks are killed then")
    parser.add_argument("--output", type=Path, help="write a page of Markdown; printed in any case")
    options = parser.parse_args()
    environment = {**os.environ, "DS_ACCELERATOR": options.device, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    os.environ.update(environment)
    began = time.monotonic()
    build = None
    if options.device == "cuda":  # a minute of nvcc, meanwhile the rest runs
        # DeepSpeed cannot read every list that an environment may have, such as 9.0a
        environment["TORCH_CUDA_ARCH_LIST"] = subprocess.check_output(
            [sys.executable, "-c", CAPABILITY], text=True
        ).strip()
        build = subprocess.Popen(
            [sys.executable, "-c", OPERATORS], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    with tempfile.TemporaryDirectory(prefix="autotp-gpu-") as name:
        work = Path(name)
        job = {"device": options.device, "only": options.only or [], "hidden": options.hidden, "layers": options.layers}
        (work / "job.json").write_text(json.dumps(job))
        needed = not options.only or any(name.startswith("hybrid") for name in options.only)
        inferring = hybrids.start(work, environment) if needed else []
        done = _run_ranks(work, environment, options.seconds)
        for process in inferring:
            process.kill()
        found = _results(work)
        if options.device == "cuda":
            found["checks"] += programs.checks(work, job["only"])
    if build is not None:
        build.kill()
    text = page(found, time.monotonic() - began)
    print(text)
    if not done:
        print("the ranks did not end: what is missing above did not run", file=sys.stderr)
    if options.output:
        options.output.write_text(text)
    sys.exit(0 if done and all(check["ok"] for check in found["checks"]) else 1)


def _run_ranks(work: Path, environment: dict[str, str], seconds: float) -> bool:
    """Whether both ranks ended by themselves."""
    processes = []
    for rank in range(RANKS):
        # LOCAL_RANK names the device: it is the same for both
        own = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        with (work / f"output-{rank}").open("w") as output:
            command = [sys.executable, "-m", "benchmarks.gpu.rank", str(work)]
            processes.append(subprocess.Popen(command, env={**environment, **own}, stdout=output, stderr=output))
    try:
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        for rank in range(RANKS):
            print(f"rank {rank}:", (work / f"output-{rank}").read_text()[-3000:], sep="\n", file=sys.stderr)
    return not any(codes)


def _results(work: Path) -> dict[str, Any]:
    path = work / "results.json"
    empty: dict[str, Any] = {"machine": {}, "checks": []}
    return json.loads(path.read_text()) if path.exists() else empty


if __name__ == "__main__":
    main()
