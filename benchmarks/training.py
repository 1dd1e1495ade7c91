"""python -m benchmarks.training [--minutes 25] [--rounds 3] [--tp 2 4] [--sizes small middle large] [--output docs]

The same Llama, the same batches, the same machine: trained by this project from pre-split shards, by DeepSpeed's
AutoTP, by transformers' own tensor parallelism, and unsharded with as many threads as there are ranks (and cores). Each
run is a process group of its own; the systems take turns; figures are medians over rounds. Rounds go on until there are
`--rounds` of them or the next would end after `--minutes`. A system whose losses are not the unsharded run's is
reported as wrong. On a CUDA machine the ranks are GPUs and talk over nccl.

Prints a table; writes benchmark.json, benchmark.md and, where matplotlib is installed, benchmark.png to `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from autotp_plan.planner import compile_plan, presplit
from benchmarks import training_report

WIDTHS = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 4096},
    "middle": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
               "num_key_value_heads": 4, "vocab_size": 16384},
    "large": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
              "num_key_value_heads": 8, "vocab_size": 24576},
}  # fmt: skip
NUM_STEPS = {"small": 12, "middle": 5, "large": 4}
WARM_UP = {"small": 2, "middle": 2, "large": 1}
BATCH_SIZE, SEQ_LENGTH = 2, 128
SYSTEMS = ("ours", "autotp", "transformers", "dense")
TOLERANCE = 1e-4
ROOT = Path(__file__).parent.parent


class Sampler:
    """Memory of other processes every 10 ms, while the block runs: `(when, RssAnon, RssFile)` in bytes, by process.

    Read from outside: a thread of the process itself waits whenever that imports or computes.
    """

    def __init__(self, pids: list[int]) -> None:
        self.samples: dict[int, list[tuple[float, int, int]]] = {pid: [] for pid in pids}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            for pid, samples in self.samples.items():
                try:
                    status = Path(f"/proc/{pid}/status").read_bytes()
                except OSError:
                    continue
                if b"RssAnon:" in status:  # not once it has ended
                    samples.append((time.monotonic(), _field(status, b"RssAnon:"), _field(status, b"RssFile:")))

    def peak(self, pid: int, which: int, begin: float, end: float) -> int:
        return int(max((sample[which] for sample in self.samples[pid] if begin <= sample[0] <= end), default=0))


def _field(status: bytes, name: bytes) -> int:
    at = status.index(name) + len(name)
    return int(status[at : status.index(b"kB", at)]) * 1024


def write_models(work: Path, sizes: list[str], tp_sizes: list[int]) -> dict[str, float]:
    """A random checkpoint of each size, and its shards; returns the millions of parameters."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    millions = {}
    for size in sizes:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **WIDTHS[size], max_position_embeddings=SEQ_LENGTH, bos_token_id=0, eos_token_id=0
        )
        model = transformers.LlamaForCausalLM(config)
        millions[size] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        model.save_pretrained(work / size / "checkpoint")
        for tp_size in tp_sizes:
            plan = compile_plan(work / size / "checkpoint", tp_size=tp_size)
            presplit(plan, work / size / "checkpoint", work / size / f"tp{tp_size}")
    return millions


def run(
    work: Path, device: str, size: str, tp_size: int, system: str, timeout: float, num_steps: int
) -> dict[str, Any]:
    """One run; its figures are those of the worst rank. `{"error": ...}` when it fails or takes too long."""
    source = work / size / (f"tp{tp_size}" if system == "ours" else "checkpoint")
    for path in source.iterdir():
        path.read_bytes()  # into the page cache
    world_size = 1 if system == "dense" else tp_size
    threads = min(tp_size, os.cpu_count() or 1) if system == "dense" else 1
    with tempfile.TemporaryDirectory(dir=work) as folder:
        job = {
            "system": system, "device": device, "backend": "gloo" if device == "cpu" else "nccl", "tp_size": tp_size,
            "threads": threads, "checkpoint": str(work / size / "checkpoint"),
            "shards": str(work / size / f"tp{tp_size}"), "store": f"{folder}/store", "results": folder,
            "batch_size": BATCH_SIZE, "seq_length": SEQ_LENGTH, "vocab_size": WIDTHS[size]["vocab_size"],
            "num_steps": num_steps,
        }  # fmt: skip
        Path(folder, "job.json").write_text(json.dumps(job))
        started, processes = time.monotonic(), []
        for rank in range(world_size):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
            }  # fmt: skip
            if device == "cpu":
                environment["DS_ACCELERATOR"] = "cpu"
            with open(f"{folder}/output-{rank}", "w") as output:
                command = [sys.executable, "-m", "benchmarks.training_rank", f"{folder}/job.json"]
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        with Sampler([process.pid for process in processes]) as sampler:
            error = _wait(processes, started + timeout)
        if error:
            said = [Path(folder, f"output-{rank}").read_text()[-2000:] for rank in range(world_size)]
            return {"error": error, "output": said}
        ranks = [json.loads(Path(folder, f"result-{rank}.json").read_text()) for rank in range(world_size)]
    return _figures(started, ranks, sampler, [process.pid for process in processes], WARM_UP[size])


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> str | None:
    """Wait for all of them; what went wrong, if anything. The first that fails ends them all."""
    try:
        while True:
            codes = [process.poll() for process in processes]
            if failed := [rank for rank, code in enumerate(codes) if code not in (None, 0)]:
                return f"rank {failed[0]} failed"
            if all(code == 0 for code in codes):
                return None
            if time.monotonic() > deadline:
                return "it took too long"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _figures(
    started: float, ranks: list[dict[str, Any]], sampler: Sampler, pids: list[int], warm_up: int
) -> dict[str, Any]:
    def worst(of: Any) -> float:
        return max(of(rank["times"], rank, pid) for rank, pid in zip(ranks, pids))

    def above_imports(times: dict[str, float], pid: int) -> int:
        """What the process had once everything was imported is not the model's."""
        imported = sampler.peak(pid, 1, times["imports"] - 0.03, times["imports"] + 0.03)
        return sampler.peak(pid, 1, times["imports"], times["ready"]) - imported

    def file_pages(times: dict[str, float], pid: int) -> int:
        peak = sampler.peak(pid, 2, times["imports"], times["ready"])
        return max(0, peak - sampler.peak(pid, 2, times["imports"] - 0.03, times["imports"] + 0.03))

    step, step_cpu = (
        statistics.median(ranks[0][name][warm_up:]) if len(ranks[0][name]) > warm_up else None
        for name in ("step_seconds", "step_cpu_seconds")
    )
    imported = worst(lambda times, rank, pid: times["imports"])
    ready = worst(lambda times, rank, pid: times["ready"])
    return {
        "import_seconds": imported - started,
        "load_seconds": ready - imported,
        "ready_seconds": ready - started,
        "first_step_seconds": worst(lambda times, rank, pid: times["first_step"] - started),
        "read_bytes": worst(lambda times, rank, pid: rank["bytes_read"]),
        "mapped_bytes": worst(lambda times, rank, pid: file_pages(times, pid)),
        "load_own_bytes": worst(lambda times, rank, pid: above_imports(times, pid)),
        "load_anon_bytes": worst(lambda times, rank, pid: sampler.peak(pid, 1, started, times["ready"])),
        "train_anon_bytes": worst(lambda times, rank, pid: sampler.peak(pid, 1, times["ready"], times["trained"])),
        "load_pss_bytes": worst(lambda times, rank, pid: rank["pss_ready"]),
        "train_pss_bytes": worst(lambda times, rank, pid: rank["pss_trained"]),
        "ready_cpu_seconds": worst(lambda times, rank, pid: rank["ready_cpu_seconds"]),
        "step_seconds": step,
        "step_cpu_seconds": step_cpu,
        "tokens_per_second": BATCH_SIZE * SEQ_LENGTH / step if step else None,
        "cuda_bytes": worst(lambda times, rank, pid: rank["cuda_bytes"]) if ranks[0]["cuda_bytes"] else None,
        "sent": ranks[0]["sent"],
        "losses": ranks[0]["losses"],
    }


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the figures of runs that went well; what was sent is the same in all of them."""
    figures: dict[str, Any] = {}
    for key, value in runs[0].items():
        if isinstance(value, (int, float)):
            figures[key] = statistics.median(run[key] for run in runs)
    return {**figures, "sent": runs[0]["sent"]}


def judge(runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any]:
    """A system's figures, how far its losses are from the unsharded run's, and what is wrong with it, if anything."""
    if failed := [run for run in runs if "error" in run]:
        return {"wrong": failed[0]["error"], "output": failed[0]["output"], "runs": runs}
    good = [run for run in dense if "error" not in run]
    if not good:
        return {"wrong": "there is no unsharded run to compare with", "runs": runs}
    reference = good[0]["losses"]
    worst = max(abs(a - b) / abs(b) for run in runs for a, b in zip(run["losses"], reference, strict=True))
    wrong = None if worst <= TOLERANCE else f"WRONG: losses differ by {worst:.1e}"
    return {"wrong": wrong, "loss_error": worst, "loss_from_to": [reference[0], reference[-1]], "runs": runs,
            "figures": median_of(runs)}  # fmt: skip


def measure(options: argparse.Namespace, work: Path, device: str) -> tuple[dict[Any, list[dict[str, Any]]], int]:
    """Every run, by `(size, tp_size, system)`, and the number of rounds."""
    began = time.monotonic() - options.spent
    cells = [(size, tp, system) for size in options.sizes for tp in options.tp for system in SYSTEMS]
    found: dict[Any, list[dict[str, Any]]] = {cell: [] for cell in cells}
    rounds = 0
    while rounds < options.rounds:
        round_began = time.monotonic()
        shared: dict[Any, dict[str, Any]] = {}
        for cell in cells:
            size, tp_size, system = cell
            same = (size, min(tp_size, os.cpu_count() or 1) if device == "cpu" else 1)
            if system == "dense" and same in shared:  # as many threads as before: the cores are fewer than the ranks
                found[cell].append(shared[same])
                continue
            result = run(work, device, *cell, options.timeout, NUM_STEPS[size])
            found[cell].append(result)
            if system == "dense":
                shared[same] = result
            said = (
                result.get("error") or f"ready in {result['ready_seconds']:5.1f} s, step {result['step_seconds']:.3f} s"
            )
            print(f"round {rounds + 1}  {size:7} TP={tp_size}  {system:12} {said}", flush=True)
        rounds += 1
        took = time.monotonic() - round_began
        if time.monotonic() - began + took > options.minutes * 60:
            break
    return found, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one run")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--folder", type=Path, help="where checkpoints and shards go; a temporary folder by default")
    options = parser.parse_args()
    began = time.monotonic()
    import torch

    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    if device == "cuda":
        options.tp = [tp for tp in options.tp if tp <= torch.cuda.device_count()]
        if not options.tp:
            sys.exit("not enough GPUs: each rank takes one. For a run on CPU set DS_ACCELERATOR=cpu")
    about = training_report.describe(options, device)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        millions = write_models(work, options.sizes, options.tp)
        for system in SYSTEMS:  # not counted: what DeepSpeed compiles and what Python caches is there afterwards
            run(work, device, options.sizes[0], options.tp[0], system, 600, 1)
        options.spent = time.monotonic() - began
        found, rounds = measure(options, work, device)
    cells = [
        {"size": size, "tp_size": tp, "system": system, **judge(runs, found[size, tp, "dense"])}
        for (size, tp, system), runs in found.items()
    ]
    report = {**about, "rounds": rounds, "millions": millions, "cells": cells,
              "seconds": round(time.monotonic() - began)}  # fmt: skip
    print(training_report.text(report))
    training_report.write(report, options.output)
    if any(cell["wrong"] for cell in cells if cell["system"] in ("ours", "dense")):
        sys.exit("this project's own run is wrong")


if __name__ == "__main__":
    main()
