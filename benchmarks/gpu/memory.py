"""Peak memory of training on a GPU: with each option that takes less of it, and with other systems."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import training_rank
from benchmarks.gpu.large_model import reset_memory, write_llama
from benchmarks.gpu.work import Found, Work, planted_in, relative

LIMIT = 1e-5
"""Of losses."""
STEPS = 3
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A way to train: arguments of `compile_plan` and `load_model`, and a stage of ZeRO."""

    name: str
    compile: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 0


OPTIONS = (
    Option(name="no option"),
    Option(name="activation checkpointing, selective", load={"activation_checkpointing": "selective"}),
    Option(name="activation checkpointing, full", load={"activation_checkpointing": "full"}),
    Option(name="loss in 16 chunks", load={"loss_chunks": 16}),
    Option(name="sequence parallelism", compile={"sequence_parallel": True}),
    Option(
        name="sequence parallelism, selective, loss in 16 chunks",
        compile={"sequence_parallel": True},
        load={"activation_checkpointing": "selective", "loss_chunks": 16},
    ),
    Option(name="ZeRO 1", zero_stage=1),
    Option(name="ZeRO 2", zero_stage=2),
    Option(name="ZeRO 3", zero_stage=3),  # the last: DeepSpeed gives its memory back when the process ends
)
"""A further option is a further line."""

SYSTEMS = {"autotp": "DeepSpeed AutoTP", "transformers": 'transformers, tp_plan="auto"', "dense": "unsharded"}


def option(option: Option, work: Work) -> Found:
    """Peak memory of three steps in float32 at TP=2, and their losses against the unsharded model's."""
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    job = _job(work)
    expected = json.loads((work.once("memory.losses", lambda path: _dense_losses(job, path)) / "losses").read_text())
    reset_memory(work)
    before = torch.cuda.memory_allocated() if work.device == "cuda" else 0
    plan = TrainingPlan(compile_plan(job["checkpoint"], tp_size=dist.get_world_size(), **option.compile))
    model = planted_in(work, plan.load_model(job["checkpoint"], **option.load).train())
    config = training_rank.deepspeed_config(dist.get_world_size())
    config["zero_optimization"] = {"stage": option.zero_stage}
    engine, *_ = plan.initialize(model, config=config)
    step = training_rank.engine_step(engine)
    losses = [step(tokens) for tokens in _batches(job)]
    figures = _memory(before) if work.device == "cuda" else {}
    engine.destroy()
    return relative(losses, expected).found(**figures)


def system(name: str, work: Work) -> Found:
    """As `option`, of another system; in processes of its own, since each changes transformers in its way.

    What goes wrong there is a figure, not a failure: it is not ours. The unsharded model's is.
    """
    job = _job(work)
    expected = json.loads((work.once("memory.losses", lambda path: _dense_losses(job, path)) / "losses").read_text())
    try:
        results = _run_system(work, {**job, "system": name})
    except RuntimeError as raised:
        if name == "dense":
            raise
        return Found(figures={"did not run": str(raised)[-300:]})
    figures = {}
    if work.device == "cuda":
        figures = {
            "states, MiB": max(one["cuda_held"] for one in results) / MIB,
            "peak, MiB": max(one["cuda_bytes"] for one in results) / MIB,
        }
    error = relative(results[0]["losses"], expected)
    if name == "dense":
        return error.found(**figures)
    return Found(figures={**figures, "largest error of a loss": error.worst})


def _job(work: Work) -> dict[str, Any]:
    """What `benchmarks.training_rank` is told, but for the system."""
    on_card = work.device == "cuda"
    name = "memory" if on_card else "memory-small"
    reduced = Work(folder=work.folder, device=work.device, hidden=2048 if on_card else work.hidden, layers=8)
    checkpoint = write_llama(reduced, name, 8 if on_card else 2, torch.float32)
    return {
        "device": work.device, "backend": "gloo", "tp_size": 2, "threads": 1, "checkpoint": str(checkpoint),
        "batch_size": 1, "seq_length": 2048 if on_card else 32, "vocab_size": 32000, "num_steps": STEPS,
    }  # fmt: skip


def _batches(job: dict[str, Any]) -> list[torch.Tensor]:
    """The batches of the steps."""
    two = training_rank.batches(job)
    return [two[number % 2] for number in range(job["num_steps"])]


def _dense_losses(job: dict[str, Any], path: Path) -> None:
    step = training_rank.start_dense(job)
    (path / "losses").write_text(json.dumps([step(tokens) for tokens in _batches(job)]))


def _memory(before: int) -> dict[str, float]:
    """Mebibytes of this rank above what was there before: between two steps, and at the peak."""
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    return {"states, MiB": held / MIB, "peak, MiB": peak / MIB}


def _run_system(work: Work, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank of another system's run wrote down."""
    folder = work.folder / f"memory-{job['system']}-{time.monotonic_ns()}"
    folder.mkdir()
    told = {**job, "store": str(folder / "store"), "results": str(folder)}
    (folder / "job.json").write_text(json.dumps(told))
    ranks = 1 if job["system"] == "dense" else 2
    processes = []
    for rank in range(ranks):
        of_rank = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
        with (folder / f"output-{rank}").open("w") as output:
            command = [sys.executable, "-m", "benchmarks.training_rank", str(folder / "job.json")]
            processes.append(
                subprocess.Popen(command, env={**os.environ, **of_rank}, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        while (codes := [process.poll() for process in processes]) != [0] * ranks:
            if failed := [rank for rank, code in enumerate(codes) if code]:
                raise RuntimeError((folder / f"output-{failed[0]}").read_text().strip()[-2000:])
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(ranks)]
