"""python -m benchmarks.inference [--write]

Seconds and memory of inferring the rules of public models from their config.json, and of proving the plans that follow
at TP=2, as `autotp-plan compile --preset infer` does. With `--write` the table of benchmarks/README.md is replaced.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.runtime.verify.run import verify_plan
from autotp_plan.runtime.verify.workers import run_ranks

ROOT = Path(__file__).parent.parent
PLANS = ROOT / "autotp_plan" / "plans"
README = ROOT / "benchmarks" / "README.md"
MODELS = (
    "llama_3_1_8b", "qwen3_8b", "phi_3_mini", "pythia_6_9b", "falcon_40b", "gemma_2_9b", "glm_4_9b", "qwen3_30b_a3b",
    "mixtral_8x7b", "deepseek_v2_lite",
)  # fmt: skip
TARGET_SECONDS = 60
TARGET_BYTES = 4 * 2**30
_TABLE = re.compile(r"(<!-- table: inference -->\n).*?(\n<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured of one model: seconds, and bytes of private memory (`RssAnon`) at their peak."""

    name: str
    inference: float
    cpu: float
    memory: int
    proof: float
    proof_memory: int
    proven: bool

    def row(self) -> str:
        return (
            f"{self.name:<18}{self.inference:>10.1f}{self.cpu:>8.1f}{self.memory / 2**20:>9.0f}{self.proof:>8.1f}"
            f"{self.proof_memory / 2**20:>9.0f}{self.inference + self.proof:>8.1f}  {'yes' if self.proven else 'NO'}"
        )


HEAD = f"{'':<18}{'inference':>10}{'of CPU':>8}{'MiB':>9}{'proof':>8}{'MiB':>9}{'both':>8}  proven"


def measured(name: str) -> Figures:
    """Infer and prove."""
    folder = PLANS / name
    started = time.perf_counter()
    ((spec, cpu, memory),) = run_ranks(infer_here, 1, folder, timeout=900)
    inference = time.perf_counter() - started
    rules = SpecFile.from_dict(spec)
    plan = compile_plan(folder, tp_size=2, preset="infer", infer=lambda _: rules, prove=lambda _: Unproven())
    started = time.perf_counter()
    with peak_of_ranks() as peaks:
        proof = verify_plan(plan)
    return Figures(
        name=name,
        inference=inference,
        cpu=cpu,
        memory=memory,
        proof=time.perf_counter() - started,
        proof_memory=max(peaks, default=0),
        proven=proof.proven,
    )


class Unproven:
    """Stands for the proof, which is measured by itself."""

    partial_gradients: tuple[str, ...] = ()
    problem: str | None = None


def infer_here(folder: Path) -> tuple[dict[str, Any], float, int]:
    """Inside a process of its own: the spec file, CPU seconds, and by how much memory grew."""
    from autotp_plan.inference.infer import infer_spec

    before, peak = private_bytes(os.getpid()), [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], private_bytes(os.getpid()) - before)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    started = resource.getrusage(resource.RUSAGE_SELF)
    spec = infer_spec(folder)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return spec, usage.ru_utime + usage.ru_stime - started.ru_utime - started.ru_stime, peak[0]


@contextmanager
def peak_of_ranks() -> Iterator[list[int]]:
    """The private memory of all processes that this one started, and those that they did: a sample every 50 ms."""
    found: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found.append(sum(map(private_bytes, descendants(os.getpid()))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def descendants(root: int) -> list[int]:
    """The processes below one."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it ended meanwhile
            continue
    found, new = [], [root]
    while new:
        new = [one for one, parent in parents.items() if parent in new]
        found += new
    return found


def private_bytes(process: int) -> int:
    """`RssAnon` of a process; 0 for one that ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def report(found: list[Figures]) -> str:
    eight = next((one for one in found if one.name == "llama_3_1_8b"), found[0])
    both, most = eight.inference + eight.proof, max(max(one.memory, one.proof_memory) for one in found)
    lines = [
        HEAD,
        *(one.row() for one in found),
        f"target: {TARGET_SECONDS} s for both of {eight.name}: {both:.0f} s, "
        f"{'met' if both <= TARGET_SECONDS else 'MISSED'}",
        f"target: {TARGET_BYTES >> 30} GiB of memory: at most {most / 2**20:.0f} MiB, "
        f"{'met' if most <= TARGET_BYTES else 'MISSED'}",
    ]
    return "\n".join(lines)


def write(text: str) -> None:
    indented = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
    date = datetime.date.today().isoformat()
    load = f"{os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    body = f"Measured on {date}, Python's processes with one thread each, load {load}:\n\n{indented}"
    README.write_text(_TABLE.sub(lambda match: match[1] + body + match[2], README.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    run_ranks(os.getpid, 1, timeout=120)  # imports torch, transformers and DeepSpeed once
    found = []
    print(HEAD, flush=True)
    for name in options.models:
        found.append(measured(name))
        print(found[-1].row(), flush=True)
        if options.write:
            write(report(found))
    print(*report(found).splitlines()[-2:], sep="\n")


if __name__ == "__main__":
    main()
