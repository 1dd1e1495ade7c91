"""python -m benchmarks.load_speed [--gb 2] [--tp 4] [--folder DIR]

Seconds of one rank to read its weights from a shards folder into memory (`map_shards=False`), beside the same bytes

- by `cat` to nowhere, which never gets new memory: the bound of the disk, when `cold` (dropped from the page cache);
- in one thread and in two, 16 MiB at a time, into one piece of new memory of huge pages: the bound of memory, when
  `warm` (in the page cache), for the kernel must clear what it hands out;
- into a tensor of `torch.empty` at once, as most loaders do.

Before each, as much memory is taken, written to and given back: a virtual machine may have to get it from its host.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.runtime.loading.read_weights import read_weights
from autotp_plan.runtime.loading.weights import open_weights
from autotp_plan.schemas.storage.uncached import huge_pages
from benchmarks.life import read_all, write_checkpoint

STEP = 16 * 2**20


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

        def load() -> object:
            return list(read_weights(source.of_rank(0), torch.device("cpu"), {}, once=True))

        def plain() -> object:
            tensor = torch.empty(file.stat().st_size, dtype=torch.uint8)
            fill(memoryview(tensor.numpy()), file, 0)  # type: ignore[arg-type]
            return tensor

        def cat() -> object:
            return subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)

        calls = {
            "load": load,
            "1 thread": lambda: into_new_memory(file, 1),
            "2 threads": lambda: into_new_memory(file, 2),
            "torch.empty": plain,
            "cat": cat,
        }
        size = file.stat().st_size
        print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "gigabytes": round(size / 1e9, 2)}))
        for state in ("warm", "cold"):
            seconds = timed(calls, shards, state == "cold", size, options.repeats)
            for name, of_call in seconds.items():
                shown = ", ".join(
                    f"{of} {size / 1e9 / one:5.1f} GB/s, load takes {load / one:5.2f} of it"
                    for of, one, load in (
                        ("median", statistics.median(of_call), statistics.median(seconds["load"])),
                        ("best", min(of_call), min(seconds["load"])),
                    )
                )
                print(f"{state}  {name:11}  {shown}", flush=True)


def fill(memory: memoryview, file: Path, position: int) -> None:
    """Read `file` from byte `position` on, as far as there is memory."""
    with open(file, "rb", buffering=0) as opened:
        while memory and (count := os.preadv(opened.fileno(), [memory], position)):
            memory, position = memory[count:], position + count


def into_new_memory(file: Path, threads: int) -> object:
    """The bytes of a file in memory that was not there before."""
    memory = huge_pages(file.stat().st_size)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: fill(memory[at : at + STEP], file, at), range(0, len(memory), STEP)))
    return memory


def timed(
    calls: dict[str, Callable[[], object]], folder: Path, cold: bool, size: int, repeats: int
) -> dict[str, list[float]]:
    """The seconds of each call; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            read_all(folder, cold)
            memory = huge_pages(size)
            for page in range(0, size, 4096):
                memory[page] = 1
            del memory
            started = time.perf_counter()
            result = call()
            found[name].append(time.perf_counter() - started)
            del result
    return found


if __name__ == "__main__":
    main()
