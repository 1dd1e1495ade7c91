"""What `estimate` predicts of an engine's memory on a GPU, beside what its ranks are given by torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.large_model import large, reset_memory
from benchmarks.gpu.work import Found, Work, relative

_LAYERS = 4
"""Two ranks with the states of 32 layers do not fit a card of 80 GiB."""


def memory(stage: int, checkpointing: bool, work: Work) -> Found:
    """The relative error of the peak of an engine's steps in bfloat16, at a stage of ZeRO."""
    from autotp_plan.runtime.estimate.run import estimate_by_running
    from autotp_plan.schemas.estimate.settings import Settings

    plan, _, shards = large(work, min(_LAYERS, work.layers))
    settings = Settings(
        zero_stage=stage,
        seq_length=2048 if work.device == "cuda" else 32,
        activation_checkpointing=checkpointing,
        device="cuda",
    )
    zero = {"stage": stage, "reduce_bucket_size": 50_000_000}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    predicted = estimate_by_running(plan.document, settings, config).fullest if dist.get_rank() == 0 else None
    dist.barrier()
    before = reset_memory(work)
    allocated = torch.cuda.memory_allocated() if work.device == "cuda" else 0
    model = plan.load_model(shards).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine, *_ = plan.initialize(model, config=config, optimizer=optimizer)
    tokens = torch.zeros(1, settings.seq_length, dtype=torch.long, device=work.device)
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    if predicted is None:
        return Found()
    figures: dict[str, Any] = {"predicted, MiB": predicted.peak / 2**20, "when": predicted.when}
    if work.device != "cuda":
        return Found(figures=figures)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    error = relative([float(predicted.peak)], [float(peak)], planted=0.25)
    of_allocator = (torch.cuda.max_memory_allocated() - allocated) / 2**20
    return error.found(**figures, **{"requested, MiB": peak / 2**20, "max_memory_allocated, MiB": of_allocator})
