"""python -m benchmarks.remote [--gigabytes 2.5] [--runs 3] [--folder FOLDER]

How fast a model on the hub is pre-split, compared with `curl` on the same bytes: a server on loopback that answers as
the hub does and sends files as the kernel can (sendfile), in a process of its own; curl with as many connections, in
ranges of the same size, to files that are then synced. Then the same to nowhere: what fetching alone takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.helpers.sparse import llama_tensors, write_sparse_checkpoint

CURL_RANGE = 8 * 1024 * 1024
SERVE = """
import sys, time
from pathlib import Path
from tests.helpers.hub_server import Repository, folder_files, hub_server
with hub_server() as server:
    for name, known in (("org/plain", False), ("org/summed", True)):
        repository = Repository(folder_files(Path(sys.argv[1])))
        if known:
            repository.sha256 = {name: repository.digest(name) for name in repository.files}
        repository.has_checksums = known
        server.repositories[name] = repository
    print(server.url, flush=True)
    sys.stdin.read()
"""
PRESPLIT = r"""
import re, sys, time
from pathlib import Path
from autotp_plan.planner import Plan, presplit
started = time.perf_counter()
presplit(Plan.read(sys.argv[1]), sys.argv[2], sys.argv[3])
print(time.perf_counter() - started, 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
"""
FETCH = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from autotp_plan.schemas.storage.files import Reader, Span
from autotp_plan.sources.model_folder import model_folder
files = list(model_folder(sys.argv[1]).elsewhere.values())
pieces = [(file, at) for file in files for at in range(0, file.size, 32 << 20)]
def fetch(worker):
    buffer = memoryview(bytearray(32 << 20))
    for file, at in pieces[worker::4]:
        count = min(32 << 20, file.size - at)
        file.read_into(buffer[:count], [Span(at, count)], Reader())
started = time.perf_counter()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(fetch, range(4)))
print(time.perf_counter() - started, 0)
"""


def write_model(folder: Path, gigabytes: float) -> int:
    """A Llama of random bytes with as many layers as it takes; returns its size."""
    config = json.loads((Path(__file__).parent.parent / "autotp_plan/plans/llama_3_1_8b/config.json").read_text())
    config.update(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, vocab_size=32000)
    config["num_hidden_layers"] = max(1, round((gigabytes - 0.26) / 0.126))
    tensors = llama_tensors(config)
    folder.mkdir()
    total = write_sparse_checkpoint(folder, config, tensors, max(1, round(gigabytes)))
    noise = os.urandom(1 << 20)
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header)
            for start in range(header, size, len(noise)):
                file.write(noise[: size - start])
    return total


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of a hub with the model, in a process of its own."""
    command = [sys.executable, "-c", SERVE, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process.stdout.readline().decode().strip()
    process.communicate()


def curl(url: str, folder: Path, output: Path | None, connections: int) -> float:
    """Seconds in which curl fetches all files in ranges; to files that are synced, or to nowhere."""
    lines = []
    for path in sorted(folder.glob("*.safetensors")):
        link = f"{url}/link/0/org/plain/{path.name}?signature=1"
        for start in range(0, path.stat().st_size, CURL_RANGE):
            target = "/dev/null" if output is None else str(output / f"{path.name}.{start}")
            lines += [f'url = "{link}"', f'output = "{target}"', f"range = {start}-{start + CURL_RANGE - 1}", "next"]
    settings = folder.parent / "curl.txt"
    settings.write_text("\n".join(lines[:-1]))
    started = time.perf_counter()
    at_once = ["--parallel", "--parallel-max", str(connections)]
    subprocess.run(
        ["curl", "--silent", "--no-progress-meter", "--fail", *at_once, "--config", str(settings)], check=True
    )
    if output is not None:
        for written in output.iterdir():
            descriptor = os.open(written, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - started


def python(code: str, *arguments: str) -> tuple[float, int]:
    """Seconds and bytes of memory that a program measured of itself."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    seconds, memory = done.stdout.split()
    return float(seconds), int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        total = write_model(work / "model", options.gigabytes)
        from autotp_plan.planner import compile_plan

        (work / "plan.json").write_text(compile_plan(work / "model", tp_size=options.tp).to_json())
        with server(work / "model") as url:
            os.environ.update(HF_ENDPOINT=url, HF_HOME=str(work / "hub"), HF_HUB_OFFLINE="0")
            output = work / "output"

            def to_files(run: Callable[[], tuple[float, int]]) -> tuple[float, int]:
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
                return run()

            def curl_to_files() -> tuple[float, int]:
                output.mkdir()
                return curl(url, work / "model", output, options.connections), 0

            ways: dict[str, Callable[[], tuple[float, int]]] = {
                "curl, to files": lambda: to_files(curl_to_files),
                "presplit": lambda: to_files(
                    lambda: python(PRESPLIT, str(work / "plan.json"), "org/plain", str(output))
                ),
                "presplit, SHA-256 compared": lambda: to_files(
                    lambda: python(PRESPLIT, str(work / "plan.json"), "org/summed", str(output))
                ),
                "curl, to nowhere": lambda: (curl(url, work / "model", None, options.connections), 0),
                "fetched, to nowhere": lambda: python(FETCH, "org/plain"),
            }
            found: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
            for _ in range(options.runs):
                for way, run in ways.items():
                    found[way].append(run())
    print(f"{total / 1e9:.2f} GB, TP={options.tp}, {os.cpu_count()} cores, {options.connections} connections of curl")
    print(f"load of the machine {os.getloadavg()[0]:.1f}; medians of {options.runs}, and the best")
    for way, results in found.items():
        beside = "curl, to nowhere" if "nowhere" in way else "curl, to files"
        memory = max(memory for _, memory in results)
        median, best = (
            (choose(one for one, _ in results), choose(one for one, _ in found[beside])) for choose in (_median, min)
        )
        print(
            f"{way:28}"
            + "  ".join(
                f"{own:6.2f} s {total / own / 1e9:5.2f} GB/s {base / own:5.2f} of curl" for own, base in (median, best)
            )
            + (f"  {memory / 1e6:.0f} MB of memory" if memory else "")
        )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
