"""python -m benchmarks.load_speed [--gb 2] [--tp 4] [--folder DIR]

Seconds of one rank to read its weights from a shards folder into memory (`map_shards=False`), beside `cat` of the same
file to nowhere, which takes memory once and not twice. `warm`: the file is in the page cache; `cold`: it was dropped
from there. `plain` is a tensor of `torch.empty` that is read into at once, as most loaders do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.runtime.loading.read_weights import read_weights
from autotp_plan.runtime.loading.weights import open_weights
from benchmarks.life import read_all, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        checkpoint, shards = Path(name, "checkpoint"), Path(name, "shards")
        write_checkpoint(checkpoint, options.gb)
        plan = compile_plan(checkpoint, tp_size=options.tp)
        presplit(plan, checkpoint, shards)
        source = open_weights(shards, plan, map_shards=False)
        (file,) = shards.glob("tp-00-*.safetensors")

        def load() -> None:
            sum(tensor.nbytes for _, tensor in read_weights(source.of_rank(0), torch.device("cpu"), {}))

        def plain() -> None:
            memory = memoryview(torch.empty(file.stat().st_size, dtype=torch.uint8).numpy())  # type: ignore[arg-type]
            with open(file, "rb", buffering=0) as opened:
                while memory and (count := opened.readinto(memory)):
                    memory = memory[count:]

        def cat() -> None:
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)

        size = file.stat().st_size
        print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "gigabytes": round(size / 1e9, 2)}))
        for state in ("warm", "cold"):
            seconds = timed({"load": load, "plain": plain, "cat": cat}, shards, state == "cold", options.repeats)
            ratios = ", ".join(
                f"{name} {size / 1e9 / one:5.1f} GB/s ({one / seconds['cat']:.2f} x cat)"
                for name, one in seconds.items()
            )
            print(f"{state}: {ratios}", flush=True)


def timed(calls: dict[str, Callable[[], None]], folder: Path, cold: bool, repeats: int) -> dict[str, float]:
    """The median seconds of each call; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            read_all(folder, cold)
            started = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(one) for name, one in found.items()}


if __name__ == "__main__":
    main()
