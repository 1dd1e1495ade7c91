"""python -m benchmarks.estimates [--only NAME] [--page docs/estimate.md]

What `estimate` predicts beside what real jobs take: ranks on the CPU that load a small checkpoint by `load_model` and
train four steps by `initialize`, while a thread reads their private memory (`RssAnon`: resident less shared, of
`/proc/self/statm`) above that before the model is loaded. `malloc` is told to give memory back
(`MALLOC_MMAP_THRESHOLD_`). The fullest rank counts. Writes the figures beside the page, and its table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(
    MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1", HF_HUB_OFFLINE="1",
    DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
)  # fmt: skip

from autotp_plan.planner import compile_plan
from autotp_plan.runtime.estimate.run import estimate_by_running
from autotp_plan.runtime.verify.workers import run_ranks
from autotp_plan.schemas.estimate.document import Estimate
from autotp_plan.schemas.estimate.settings import Settings

PAGE = os.sysconf("SC_PAGE_SIZE")
BUCKET = 500_000
"""Elements of ZeRO's buckets, which at DeepSpeed's default of 500 million are larger than these models."""
LARGE = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 4096, "intermediate_size": 1408,
    "max_position_embeddings": 2048,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "gpt_neox": {},
    "gemma2": {"head_dim": 64, "sliding_window": 256, "num_hidden_layers": 2},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 704},
}


@dataclass(frozen=True)
class Run:
    """A job: a family, its mesh and how it is trained."""

    family: str
    tp_size: int
    settings: Settings = field(default_factory=Settings)

    @property
    def name(self) -> str:
        """`llama TP=2 x DP=2, ZeRO 1, 4 x 512, fp32, checkpointing`."""
        given = self.settings
        batch = f"{given.micro_batch_size} x {given.seq_length}"
        if given.gradient_accumulation_steps > 1:
            batch += f" x {given.gradient_accumulation_steps}"
        said = f"{self.family} TP={self.tp_size} x DP={given.dp_size}, ZeRO {given.zero_stage}, {batch}, {given.dtype}"
        return said + ", checkpointing" * given.activation_checkpointing


def run(family: str, tp_size: int, dp_size: int, stage: int, length: int, **more: Any) -> Run:
    """A run; more settings by name."""
    given: dict[str, Any] = {"micro_batch_size": 2048 // length, "dtype": "fp32", "device": "cpu"}
    settings = Settings(dp_size=dp_size, zero_stage=stage, seq_length=length, **{**given, **more})
    return Run(family, tp_size, settings)


RUNS = [
    run("llama", 1, 1, 0, 512),
    run("llama", 1, 2, 1, 1024),
    run("llama", 2, 1, 0, 1024),
    run("llama", 2, 2, 2, 512),
    run("llama", 4, 1, 0, 1024, activation_checkpointing=True),
    run("llama", 2, 2, 3, 1024, activation_checkpointing=True),
    run("llama", 2, 1, 0, 512, gradient_accumulation_steps=2),
    run("llama", 2, 2, 1, 1024, dtype="bf16"),
    run("phi3", 2, 2, 1, 1024),
    run("phi3", 4, 1, 0, 512),
    run("gpt_neox", 2, 2, 3, 512),
    run("gpt_neox", 4, 1, 0, 1024),
    run("gemma2", 2, 2, 2, 512),
    run("qwen3_moe", 2, 2, 3, 512),
    run("qwen3_moe", 2, 1, 0, 1024, activation_checkpointing=True),
]


class Sampler(threading.Thread):
    """Reads this process's private memory as often as it can; `peak` is the most, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.samples, self.ends = 0, 0, False

    def run(self) -> None:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            while not self.ends:
                file.seek(0)
                self.peak = max(self.peak, private(file.read()))
                self.samples += 1
                time.sleep(0.0005)


def private(statm: bytes) -> int:
    """Resident memory less what is of files or shared."""
    fields = statm.split()
    return (int(fields[1]) - int(fields[2])) * PAGE


def measured_rank(jobs: list[tuple[Path, Path]], settings: Settings) -> tuple[int, int]:
    """The most private memory of a rank above that before its job, and how often it was read.

    The first of the jobs is a small one, after which everything is imported.
    """
    import gc

    small, large = jobs
    train(*small, dataclasses.replace(settings, seq_length=32))
    gc.collect()
    before = private(Path("/proc/self/statm").read_bytes())
    sampler = Sampler()
    sampler.start()
    train(*large, settings)
    sampler.ends = True
    sampler.join()
    return sampler.peak - before, sampler.samples


def train(plan_file: Path, checkpoint: Path, settings: Settings) -> None:
    """Load a model and train it for four steps."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.estimate.engine_step import DTYPES

    plan = load_plan(plan_file)
    ranks = plan.init_mesh()
    model: Any = plan.load_model(checkpoint, dtype=DTYPES[settings.dtype]).train()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4, fused=True)
    engine, *_ = plan.initialize(model, config=ds_config(settings), optimizer=optimizer)
    generator = torch.Generator().manual_seed(ranks.dp_rank)
    for _ in range(4 * settings.gradient_accumulation_steps):
        shape = (settings.micro_batch_size, settings.seq_length)
        tokens = torch.randint(3, 250, shape, generator=generator)
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        del loss
        engine.step()


def ds_config(settings: Settings) -> dict[str, Any]:
    """The DeepSpeed config of a run."""
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "bf16": {"enabled": settings.dtype == "bf16"},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
        },
    }


def compared(one: Run, folder: Path) -> dict[str, Any]:
    """A run, predicted and measured."""
    from tests.helpers.models import save_checkpoint

    jobs = []
    for size, changes in (("small", {}), ("large", {**LARGE, **FAMILIES[one.family]})):
        checkpoint = folder / f"{one.family}-{size}"
        if not checkpoint.exists():
            save_checkpoint(checkpoint, one.family, **changes)
        plan = compile_plan(checkpoint, tp_size=one.tp_size)
        plan_file = folder / f"plan-{size}.json"
        plan_file.write_text(plan.to_json())
        jobs.append((plan_file, checkpoint))
    started = time.monotonic()
    predicted: Estimate = estimate_by_running(plan, one.settings, ds_config(one.settings))
    seconds = time.monotonic() - started
    world_size = one.tp_size * one.settings.dp_size
    found = run_ranks(measured_rank, world_size, jobs, one.settings, timeout=500)
    most = max(size for size, _ in found)
    peak = predicted.fullest.peak
    return {
        "name": one.name,
        "predicted": peak,
        "measured": most,
        "error": peak / most - 1,
        "seconds": seconds,
        "when": predicted.fullest.when,
        "parts": {part.what: part.bytes for part in predicted.fullest.at_peak},
        "samples": min(count for _, count in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name has this")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="autotp-estimates-") as name:
        for one in RUNS:
            if given.only in one.name:
                rows.append(compared(one, Path(name)))
                row = rows[-1]
                print(
                    f"{row['name']:62} predicted {row['predicted'] / 2**20:7.1f} MiB  measured "
                    f"{row['measured'] / 2**20:7.1f}  {row['error']:+6.1%}  ({row['when']}; {row['samples']} samples)",
                    flush=True,
                )
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    document = {"python": platform.python_version(), **packages, "runs": rows}
    print(verdict(document))
    if given.page is not None:
        given.page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        given.page.write_text(with_table(given.page.read_text(encoding="utf-8"), document), encoding="utf-8")


def verdict(document: dict[str, Any]) -> str:
    """`Of 15 runs the median error is 1.2 %, the largest 6.1 %.`"""
    errors = [abs(row["error"]) for row in document["runs"]]
    return f"Of {len(errors)} runs the median error is {statistics.median(errors):.1%}, the largest {max(errors):.1%}."


def with_table(page: str, document: dict[str, Any]) -> str:
    """A page whose table is that of a document."""
    lines = ["| job | predicted, MiB | measured, MiB | error |", "| --- | ---: | ---: | ---: |"]
    for row in document["runs"]:
        sizes = f"{row['predicted'] / 2**20:.1f} | {row['measured'] / 2**20:.1f}"
        lines.append(f"| {row['name']} | {sizes} | {row['error']:+.1%} |")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + "\n".join([BEGIN, *lines, "", verdict(document), END]) + after


BEGIN, END = "<!-- begin: python -m benchmarks.estimates -->", "<!-- end -->"


if __name__ == "__main__":
    main()
