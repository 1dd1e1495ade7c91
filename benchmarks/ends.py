"""How often jobs end with status 0: many short jobs of two ranks, each of which ends as a script does.

    nice -n 19 python benchmarks/ends.py --jobs 2000 --load 4

Every tenth job loads a small model by a plan and takes two steps; the others make the plan's process groups and use
them. Each leaves the rest to the end of the interpreter; every second one destroys its process groups before. The ranks
are forked from a process that has imported everything, so that a job takes a second or two, and end as if each were a
script of its own. `--load` is the number of processes that only use up
processor time meanwhile, so that threads lose their core at any moment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECONDS = 300


def prepare(folder: Path) -> None:
    """A small checkpoint and its plan."""
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    checkpoint = save_checkpoint(folder / "checkpoint", "llama")
    (folder / "plan.json").write_text(compile_plan(checkpoint, tp_size=2).to_json())


def job(folder: Path, port: int, rank: int, number: int) -> object:
    """What a rank does; it returns what a script would still hold when it ends."""
    import torch
    from deepspeed import comm

    from autotp_plan.runtime import load_plan

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address)
    plan = load_plan(folder / "plan.json")
    held: object = plan.init_mesh()
    if number % 10 == 1:
        held = train(plan, folder)
    for _ in range(4):
        torch.distributed.all_reduce(torch.ones(1), group=plan.ranks.tp_group)
    torch.distributed.all_reduce(torch.ones(1))
    if number % 2:
        comm.destroy_process_group()
    return held


def train(plan: Any, folder: Path) -> object:
    """Two steps; the engine."""
    import torch

    model = plan.load_model(folder / "checkpoint")
    config = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }  # fmt: skip
    engine, *_ = plan.initialize(model, config=config)
    tokens = torch.ones(1, 8, dtype=torch.long)
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return engine


def started(folder: Path, port: int, rank: int, number: int) -> int | object:
    """The process of a rank; in that process, what it holds when it ends."""
    process = os.fork()
    if process:
        return process
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(SECONDS)
    return job(folder, port, rank, number), None


def main() -> object:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--load", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file with the counts so far")
    options = parser.parse_args()

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import autotp_plan.runtime.training_plan  # noqa: F401

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())  # which only this process removes, and no rank that ends
    prepare(folder)
    load = [_busy() for _ in range(options.load)]
    ended: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(1, options.jobs + 1):
        ranks = []
        for rank in range(2):
            process = started(folder, 21000 + number % 9000, rank, number)
            if not isinstance(process, int):
                return process
            ranks.append(process)
        for rank, process in enumerate(ranks):
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            ended[str(status)] += 1
            if status:
                print(f"job {number}, rank {rank}: status {status}", flush=True)
                print((folder / f"output-{rank}").read_text()[-2000:], flush=True)
        minutes = (time.monotonic() - began) / 60
        if options.output:
            counts = {"jobs": number, "by status": ended, "load": options.load, "minutes": round(minutes, 1)}
            options.output.write_text(json.dumps(counts) + "\n")
        if minutes > options.minutes:
            break
    for process in load:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    shutil.rmtree(folder)
    print(f"{number} jobs in {minutes:.1f} minutes; ranks by exit status: {dict(ended)}")
    return None


def _busy() -> int:
    process = os.fork()
    while not process:
        pass
    return process


if __name__ == "__main__":
    HELD = main()  # a rank that was forked comes here too, and ends as a script ends
