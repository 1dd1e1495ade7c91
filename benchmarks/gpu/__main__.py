"""python -m benchmarks.gpu [--device cuda|cpu] [--small] [--only NAME] [--seconds 450] [--output docs]

What holds on CPU, on a GPU: the sharded model against the unsharded one, on the same card; and what only a GPU can
tell: memory and rates of loading. Two TP ranks share one card and talk over gloo, because NCCL refuses two ranks of one
device; NCCL runs with one rank. Prints a page, writes gpu.md and gpu.json to `--output`, and ends with 1 when anything
differs. `--device cpu --small` tries the program itself on a machine without a card, in a minute.

The most important checks run first. A check that takes longer than its limit is stopped, and when the time is over the
rest is not run; the page says which.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu import hybrids
from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.record import Outcome, Record, Run, State
from benchmarks.gpu.report import page, row
from benchmarks.gpu.supervise import run_checks
from benchmarks.gpu.work import Check

OPERATORS = (
    "import torch; from deepspeed.ops import op_builder;"
    "op_builder.FusedAdamBuilder().load(); op_builder.CPUAdamBuilder().load()"
)
CAPABILITY = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"
PACKAGES = (
    "torch", "deepspeed", "transformers", "accelerate", "safetensors", "triton", "flash-attn", "mamba-ssm",
    "causal-conv1d", "flash-linear-attention", "liger-kernel",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="one check of each kind")
    parser.add_argument("--only", action="append", help="run the checks whose name begins so; may be given again")
    parser.add_argument("--hidden", type=int, help="hidden size of the model that is loaded and timed (4096; CPU: 64)")
    parser.add_argument("--layers", type=int, help="its layers (32; CPU: 1)")
    parser.add_argument("--seconds", type=float, default=450, help="what has not run by then is not run")
    parser.add_argument("--plant", action="store_true", help="make a gradient of every sharded model wrong")
    parser.add_argument("--output", type=Path, help="a folder: its gpu.json gets this run, its gpu.md is made of it")
    parser.add_argument(
        "--again", action="store_true", help="run nothing: make the page of the record in --output anew"
    )
    options = parser.parse_args()
    if options.again:
        _write(options.output or Path("docs"))
        return
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # not without the ranks
    os.environ.update(DS_ACCELERATOR=options.device, HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA card; --device cpu tries the checks without one")
    checks = chosen(options.only, options.small, options.device)
    if not checks:
        sys.exit("no check has such a name")
    job = {
        "device": options.device,
        "hidden": options.hidden or (4096 if options.device == "cuda" else 64),
        "layers": options.layers or (32 if options.device == "cuda" else 1),
        "plant": options.plant,
    }
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(row(outcome), flush=True)
        if outcome.state is State.FAILED:
            print(outcome.reason, file=sys.stderr, flush=True)

    build = _build_operators() if options.device == "cuda" else None
    with tempfile.TemporaryDirectory(prefix="autotp-gpu-") as name:
        needed = {check.hybrid for check in checks} - {""}
        inferring = hybrids.start(Path(name), dict(os.environ), sorted(needed))
        try:
            run_checks(Path(name), job, checks, began + options.seconds, report)
        finally:
            for process in inferring:
                process.kill()
            if build is not None:
                build.kill()
    run = _run(options, outcomes, time.monotonic() - began)
    print(page(Record(runs=(run,))))
    if options.output:
        _write(options.output, run)
    if run.failed:
        sys.exit(f"{len(run.failed)} of {len(outcomes)} checks failed: " + ", ".join(one.name for one in run.failed))


def chosen(only: list[str] | None, small: bool, device: str) -> list[Check]:
    """The checks to run, those of the names alone if there are any; on a CPU with few starts of ranks."""
    found = [
        check
        for check in CHECKS
        if (any(check.name.startswith(name) for name in only) if only else check.small or not small)
        and not (check.needs_cuda and device != "cuda")
    ]
    return found if device == "cuda" else sorted(found, key=lambda check: -check.ranks)


def _build_operators() -> subprocess.Popen[bytes]:
    """DeepSpeed's operators for the card: a minute of nvcc, while other checks run."""
    # DeepSpeed cannot read every list that an environment may have, such as 9.0a
    capability = subprocess.check_output([sys.executable, "-c", CAPABILITY], text=True).strip()
    os.environ["TORCH_CUDA_ARCH_LIST"] = capability
    return subprocess.Popen([sys.executable, "-c", OPERATORS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(options: argparse.Namespace, outcomes: list[Outcome], seconds: float) -> Run:
    on_card = options.device == "cuda"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if on_card:
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Run(
        date=datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        card=torch.cuda.get_device_name(0) if on_card else None,
        memory=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if on_card else None,
        versions=versions,
        seconds=round(seconds, 1),
        outcomes=tuple(outcomes),
    )


def _write(folder: Path, run: Run | None = None) -> None:
    """Add a run, if there is one, to the record in a folder, and write the page of the record."""
    path = folder / "gpu.json"
    record = Record.from_json(path.read_text(encoding="utf-8")) if path.exists() else Record()
    record = record if run is None else record.with_run(run)
    for file, text in ((path, record.to_json()), (folder / "gpu.md", page(record))):
        unfinished = file.with_name(f"{file.name}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)


if __name__ == "__main__":
    main()
