"""The shapes of a published model on a GPU: memory while it is loaded, its loss, and what comparing batches takes."""

from __future__ import annotations

import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.work import Error, Found, Work, relative


def write_llama(work: Work, name: str, layers: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random Llama; with hidden size 4096, 32 layers and bfloat16 it has the shapes of Llama-3.1-8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(path: Path) -> None:
        heads = max(2, work.hidden // 128)
        config: Any = LlamaConfig(
            hidden_size=work.hidden, intermediate_size=work.hidden * 7 // 2, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=max(2, heads // 4), dtype=dtype,
            vocab_size=128256 if work.hidden >= 4096 else 32000,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(work.device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(path)
        del model
        reset_memory(work)

    return work.once(name, write)


def large(work: Work, layers: int | None = None) -> Any:
    """A plan, a checkpoint and the shards of the large model, or of one with fewer layers."""
    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.runtime import TrainingPlan

    name = "large" if layers is None else f"large-{layers}"
    folder = write_llama(work, name, layers or work.layers)
    plan = TrainingPlan(compile_plan(folder, tp_size=dist.get_world_size()))
    return plan, folder, work.once(f"{name}.shards", lambda path: presplit(plan.document, folder, path))


def loading(work: Work) -> Found:
    """Memory of the card while a rank's shards are loaded: the error is the relative excess over their bytes."""
    plan, folder, shards = large(work)
    figures: dict[str, Any] = {}
    excess = 0.0
    for name, source in (("shards", shards), ("checkpoint", folder)):
        before = reset_memory(work)
        dist.barrier()
        began = time.perf_counter()
        model = plan.load_model(source)
        synchronize(work)
        figures[f"{name}, s"] = time.perf_counter() - began
        weights = sum(value.numel() * value.element_size() for value in model.parameters())
        figures["weights, MiB"] = weights / 2**20
        if work.device == "cuda":
            peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
            figures[f"{name}, peak MiB"] = peak / 2**20
            excess = max(excess, peak / weights - 1)
        del model
    if work.device != "cuda":
        return Found(figures=figures)
    return Error(worst=excess, planted=excess + 0.05).found(**figures)


def large_loss(work: Work) -> Found:
    """The loss of the large model in bfloat16, and the norm of its gradient."""
    from transformers import AutoModelForCausalLM

    plan, folder, shards = large(work)
    length = 2048 if work.device == "cuda" else 32
    tokens = torch.randint(32000, (1, length), generator=torch.Generator().manual_seed(0)).to(work.device)
    found = []
    for name in ("sharded", "unsharded"):
        model: Any = None
        if name == "sharded":
            model = plan.load_model(shards).train()
        elif dist.get_rank() == 0:  # there may be no room for two
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(work.device).train()
        if model is not None:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            found.append([loss.item(), norm.item()])
        dist.barrier()
        del model
        reset_memory(work)
    figures: dict[str, Any] = {"loss": found[0][0], "gradient norm": found[0][1]}
    if len(found) == 1 or work.device != "cuda":  # at small sizes bfloat16 rounds a norm by as much as the limit
        return Found(figures=figures)
    return relative(found[0], found[1], planted=0.03).found(**figures, unsharded=found[1])


def steps(work: Work) -> Found:
    """The share of a forward and backward pass in bfloat16 that comparing the batches of every 100th takes."""
    plan, _, shards = large(work)
    shape = (1, 2048) if work.device == "cuda" else (1, 32)
    tokens = torch.randint(32000, shape, generator=torch.Generator().manual_seed(0)).to(work.device)
    model = plan.load_model(shards, check_batches_every=2).train()
    times: list[list[float]] = [[], []]  # every second forward compares, the first among them
    for number in range(16):
        dist.barrier()
        synchronize(work)
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        synchronize(work)
        model.zero_grad()
        if number > 3:
            times[number % 2].append(time.perf_counter() - began)
    compared, without = (statistics.median(of_kind) for of_kind in times)
    share = (compared - without) / without / 100
    figures = {"forward and backward, ms": without * 1e3, "with comparison, ms": compared * 1e3}
    figures["share at every 100th, %"] = share * 100
    if work.device != "cuda":  # where other programs run too
        return Found(figures=figures)
    return Error(worst=max(share, 0.0), planted=share + 0.01).found(**figures)


def reset_memory(work: Work) -> int:
    """Forget the peak; the bytes that are held now."""
    gc.collect()  # engines of DeepSpeed are circles
    if work.device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def synchronize(work: Work) -> None:
    """Wait for the card, if there is one."""
    if work.device == "cuda":
        torch.cuda.synchronize()
