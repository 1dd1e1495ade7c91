"""python -m benchmarks.remote_checksums [--layers 2] [--runs 3] [--folder FOLDER]

What it costs to compare the hub's SHA-256: the same model is pre-split from a hub on loopback that says checksums, and
from one that does not, in turn. Printed are the medians of the time and of the processor's time of `presplit`, the
bytes that were fetched over those of the files, and the largest anonymous memory above that after imports.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.dequantize import FP8, GPT_OSS, INT4, LLAMA, MXFP4, Arrays, bf16, fp8, gpt_oss, int4, llama, write
from benchmarks.remote import server

PRESPLIT = r"""
import os, re, resource, sys, threading, time
from pathlib import Path
from autotp_plan.planner import Plan, presplit
import numpy, huggingface_hub, http.client
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
used, started = time.process_time(), time.perf_counter()
presplit(Plan.read(sys.argv[1]), sys.argv[2], sys.argv[3], workers=int(sys.argv[4]))
took, used = time.perf_counter() - started, time.process_time() - used
done = True
watcher.join()
print(took, used, most - before)
"""


def published(arrays: Arrays) -> Arrays:
    """In the order in which safetensors writes tensors: those of the longest items first."""
    sizes = {"F32": 4, "I32": 4, "BF16": 2}
    return dict(sorted(arrays.items(), key=lambda item: (-sizes.get(item[1][0], 1), item[0])))


def as_bin(folder: Path) -> None:
    """The weights of a folder as a `.bin` file."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the Llama; each is 436 MB in bf16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the files are written")
    options = parser.parse_args()
    dense: dict[str, Any] = {**LLAMA, "num_hidden_layers": options.layers}
    experts: dict[str, Any] = {**GPT_OSS, "num_hidden_layers": 1}
    cases: dict[str, tuple[dict[str, Any], Callable[[], Arrays]]] = {
        "bf16": (dense, lambda: llama(bf16, options.layers)),
        "bf16 in .bin": (dense, lambda: llama(bf16, options.layers)),
        "fp8": ({**dense, "quantization_config": FP8}, lambda: llama(fp8, options.layers)),
        "int4": ({**dense, "quantization_config": INT4}, lambda: llama(int4, options.layers)),
        "MXFP4": ({**experts, "quantization_config": MXFP4}, lambda: gpt_oss(True)),
    }
    print("| format | GB | s | compared, s | ratio | CPU s | compared | ratio | fetched | compared | MB | compared |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, (config, arrays) in cases.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as found:
            work = Path(found)
            folder = write(work / "model", config, published(arrays()))
            if name.endswith(".bin"):
                as_bin(folder)
            measure(name, folder, work, options)


def measure(name: str, folder: Path, work: Path, options: argparse.Namespace) -> None:
    """A row of the table."""
    from autotp_plan.planner import compile_plan

    (work / "plan.json").write_text(compile_plan(folder, tp_size=options.tp).to_json())
    size = sum(path.stat().st_size for path in folder.iterdir())
    found: dict[str, list[list[float]]] = {"org/plain": [], "org/summed": []}
    with server(folder) as url:
        os.environ.update(HF_ENDPOINT=url, HF_HOME=str(work / "hub"), HF_HUB_OFFLINE="0")
        sent = fetched(url)
        for _ in range(options.runs):
            for place, results in found.items():
                shutil.rmtree(work / "output", ignore_errors=True)
                os.sync()
                arguments = [str(work / "plan.json"), place, str(work / "output"), str(options.workers)]
                command = [sys.executable, "-c", PRESPLIT, *arguments]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                before, sent = sent, fetched(url)
                results.append([*map(float, done.stdout.split()), (sent - before) / size])
    plain, summed = ([statistics.median(values) for values in zip(*results)] for results in found.values())
    print(
        f"| {name} | {size / 1e9:.2f} | {plain[0]:.2f} | {summed[0]:.2f} | {summed[0] / plain[0]:.2f} "
        f"| {plain[1]:.2f} | {summed[1]:.2f} | {summed[1] / plain[1]:.2f} | {plain[3]:.3f} | {summed[3]:.3f} "
        f"| {plain[2] / 1e6:.0f} | {summed[2] / 1e6:.0f} |",
        flush=True,
    )


def fetched(url: str) -> int:
    """Bytes of weights that the server has sent."""
    with urllib.request.urlopen(f"{url}/sent") as answer:
        return int(answer.read())


if __name__ == "__main__":
    main()
