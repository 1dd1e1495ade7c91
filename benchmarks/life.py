"""python -m benchmarks.life [--gb 1 4 16] [--folder DIR] [--tp 8] [--commands presplit merge reshard]

Time of presplit, merge and reshard as a ratio to `cp -r` of the same bytes on the same file system, and their memory
(the peak of RssAnon, above an interpreter with everything imported). Each command is a process of its own, start-up
included, and ends when its files are on disk; so `cp` is timed alone and with the `sync` of its files after it. `warm`:
the input is in the page cache; `cold`: it was dropped from there (posix_fadvise; run where nothing else reads it).
Of input larger than half of the memory not all is in the cache when `warm`. The disk must hold the input four times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from autotp_plan.planner import compile_plan
from autotp_plan.schemas.storage.safetensors_header import read_header
from tests.helpers.sparse import Tensors, write_sparse_checkpoint

MIB = 2**20
TARGET_MIB = 256
COMMANDS = ("presplit", "merge", "reshard")


def mixture(num_layers: int) -> tuple[dict[str, object], Tensors]:
    """A Mixtral of 16 small experts a layer, which transformers fuses: column, row and 3-D weights; 0.5 GB a layer."""
    hidden, inner, experts, vocabulary = 2048, 2048, 16, 16000
    config: dict[str, object] = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": experts,
        "num_experts_per_tok": 2, "num_hidden_layers": num_layers, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (vocabulary, hidden))}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = ("BF16", (rows, hidden))
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = ("BF16", (experts, hidden))
        for expert in range(experts):
            for leaf, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{leaf}.weight"] = ("BF16", shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("BF16", (hidden,))
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    tensors["lm_head.weight"] = ("BF16", (vocabulary, hidden))
    return config, tensors


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Random bytes under a mixture's headers; returns how many."""
    folder.mkdir()
    config, tensors = mixture(max(1, round((gigabytes * 1e9 - 0.13e9) / 0.424e9)))
    total = write_sparse_checkpoint(folder, config, tensors, max(1, round(gigabytes)))
    block = memoryview(os.urandom(32 * MIB))
    for path in folder.glob("*.safetensors"):
        header = read_header(path)
        with open(path, "r+b") as file:
            file.seek(header.tensors[0].start)
            left = header.size - header.tensors[0].start
            while left:
                left -= file.write(block[:left])
            os.fsync(file.fileno())
    return total


def read_all(folder: Path, cold: bool) -> None:
    """Bring every file of a folder into the page cache, or drop it from there."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(8 * MIB):
                    pass


def run(command: list[str], output: Path) -> tuple[float, float, int, float]:
    """Seconds of a command, of it and a sync of what it wrote; the peak of its RssAnon in bytes; its CPU seconds."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(0.01)
    alone = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
    subprocess.run(["sync", *map(str, output.iterdir())], check=True)
    return alone, time.perf_counter() - started, peak, used


def rss_anon(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return 0
    at = status.find(b"RssAnon:")
    return int(status[at + 8 : status.index(b"kB", at)]) * 1024 if at >= 0 else 0


def interpreter() -> int:
    """RssAnon of a process that has imported what the commands import."""
    code = (
        "import numpy, autotp_plan.planner.cli.main, autotp_plan.planner, jsonschema, time; print(flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    found = rss_anon(process.pid)
    process.communicate(b"\n")
    return found


def measure(work: Path, gigabytes: float, tp_size: int, repeats: int, chosen: Collection[str]) -> float:
    """Print a table for one size; the largest memory above the interpreter's, in MiB."""
    checkpoint, plan = work / "checkpoint", work / "plan.json"
    total = write_checkpoint(checkpoint, gigabytes)
    plan.write_text(compile_plan(checkpoint, tp_size=tp_size).to_json())
    tool = [sys.executable, "-m", "autotp_plan.planner.cli"]
    base = interpreter()
    shards, out = work / "shards", work / "out"
    presplit = ["presplit", str(plan), "--checkpoint", str(checkpoint), "--quiet", "-o"]
    shards.mkdir()
    if set(chosen) - {"presplit"}:
        run([*tool, *presplit, str(shards)], shards)
    every = {
        "presplit": ([*tool, *presplit, str(out)], checkpoint),
        "merge": ([*tool, "merge", str(shards), "--quiet", "-o", str(out)], shards),
        "reshard": ([*tool, "reshard", str(shards), "--tp", str(tp_size // 2), "--quiet", "-o", str(out)], shards),
    }
    commands = {name: command for name, command in every.items() if name in chosen}
    worst = 0.0
    for state in ("warm", "cold"):
        copied: list[tuple[float, float, int, float]] = []
        timed: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in commands}
        for _ in range(repeats):  # in turn, so that all of them meet the same machine
            read_all(checkpoint, state == "cold")
            copied.append(run(["cp", "-r", str(checkpoint), str(out)], out))
            for name, (command, source) in commands.items():
                read_all(source, state == "cold")
                timed[name].append(run(command, out))
        cp, synced, cp_used = (statistics.median(result[at] for result in copied) for at in (0, 1, 3))
        print(
            f"{total / 1e9:5.1f} GB {state}  cp {cp:6.2f} s, with sync {synced:6.2f} s; CPU {cp_used:5.2f} s",
            flush=True,
        )
        for name, results in timed.items():
            seconds = statistics.median(result[0] for result in results)
            used = statistics.median(result[3] for result in results)
            memory = (max(result[2] for result in results) - base) / MIB
            worst = max(worst, memory)
            ratios = f"{seconds / cp:5.2f} x cp, {seconds / synced:5.2f} x cp and sync; CPU {used:5.2f} s"
            print(
                f"    {name:9} {seconds:6.2f} s  {total / 1e9 / seconds:5.2f} GB/s  {ratios}  {memory:6.1f} MiB",
                flush=True,
            )
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(shards)
    shutil.rmtree(checkpoint)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--folder", type=Path, help="on the file system to measure; a temporary folder by default")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commands", nargs="+", default=COMMANDS, choices=COMMANDS)
    options = parser.parse_args()
    print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "tp_size": options.tp}))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        worst = max(measure(Path(name), size, options.tp, options.repeats, options.commands) for size in options.gb)
    met = "met" if worst <= TARGET_MIB else "MISSED"
    print(f"target: at most {TARGET_MIB} MiB of memory of its own: {worst:.1f} MiB, {met}")


if __name__ == "__main__":
    main()
