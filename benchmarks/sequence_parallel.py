"""python -m benchmarks.sequence_parallel [--tp 4] [--width 1024] [--length 1024] [--rounds 20]

Sequence parallelism beside the same plan without it, in one run on the CPU: what autograd keeps for the backward of a
Llama layer (tensors seen by `saved_tensors_hooks`, each once, without weights) and RssAnon; seconds of a forward and
backward, in turns; bytes of the collectives as a ring moves them, an all-reduce's twice.

Of a Llama-3.1-8B layer, on tensors without data: `python -m benchmarks.selective_checkpointing`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotp_plan.runtime.verify.workers import run_ranks

KINDS = (None, "selective", "full")
LAYERS = (2, 4)
"""What the second has more than the first are layers, and nothing else."""
M_MMAP_THRESHOLD = -3


def rss_anon() -> int:
    """Bytes of memory of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def forward_and_back(model: Any, tokens: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """A forward with its loss, and a backward of that."""

    def forward() -> Any:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def backward(output: Any) -> None:
        output.backward()
        model.zero_grad()

    return forward, backward


def kept(model: Any, tokens: Any) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward: by autograd's own hooks, and by RssAnon."""
    import torch

    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)  # so that memory goes back as soon as it is free
    forward, backward = forward_and_back(model, tokens)
    backward(forward())
    held = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    seen = sum(saved.values())
    backward(output)
    del output
    gc.collect()
    libc.malloc_trim(0)
    before = rss_anon()
    output = forward()
    gc.collect()
    libc.malloc_trim(0)
    grown = rss_anon() - before
    backward(output)
    return seen, grown


def memory(folder: Path, length: int) -> list[tuple[int, int]]:
    """On a rank: what a model keeps by each kind of activation checkpointing, without and with sequence parallelism."""
    import torch

    from autotp_plan.runtime import load_plan

    tokens = torch.arange(length).view(1, length) % 512
    found = []
    for name in ("without", "with"):
        for kind in KINDS:
            model: Any = load_plan(folder / f"{name}.json").load_model(
                folder, dtype=torch.float32, activation_checkpointing=kind
            )
            found.append(kept(model.train(), tokens))
            del model
            gc.collect()
    return found


def steps(folder: Path, length: int, rounds: int) -> tuple[list[list[float]], list[int]]:
    """On a rank: seconds of forward and backward without and with, in turns; and the bytes of their collectives."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.estimate.fake_internals import Watch

    torch.set_num_threads(1)
    tokens = torch.arange(length).view(1, length) % 512
    both = [load_plan(folder / f"{name}.json").load_model(folder, dtype=torch.float32).train()
            for name in ("without", "with")]  # fmt: skip
    sizes = []
    for model in both:
        forward, backward = forward_and_back(model, tokens)
        moved: Counter[str] = Counter()
        with Watch(lambda operation, _, size, moved=moved: moved.update({operation: size})):  # type: ignore[misc]
            backward(forward())
        sizes.append(sum(size * (2 if operation == "allreduce_" else 1) for operation, size in moved.items()))
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            forward, backward = forward_and_back(both[which], tokens)
            torch.distributed.barrier()
            started = time.perf_counter()
            backward(forward())
            seconds[which].append(time.perf_counter() - started)
    return seconds, sizes


def prepare(folder: Path, tp_size: int, width: int, layers: int) -> Path:
    """A Llama of a few layers, in the proportions of Llama-3.1-8B, and its two plans."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from autotp_plan.planner import compile_plan

    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 7 // 2, num_attention_heads=heads, num_key_value_heads=heads // 4,
        num_hidden_layers=layers, vocab_size=512, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name, asked in (("without", False), ("with", True)):
        plan = compile_plan(folder, tp_size=tp_size, sequence_parallel=asked)
        (folder / f"{name}.json").write_text(plan.to_json())
    return folder


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--tp", 4), ("--width", 1024), ("--length", 1024), ("--rounds", 20)):
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    print(f"a layer of a Llama {options.width} wide, float32, {options.length} tokens")
    with tempfile.TemporaryDirectory() as name:
        few, many = (
            run_ranks(
                memory, options.tp, prepare(Path(name) / f"{layers}", options.tp, options.width, layers),
                options.length, timeout=900,
            )[0]
            for layers in LAYERS
        )  # fmt: skip
        more = LAYERS[1] - LAYERS[0]
        found = [tuple((b - a) / more for a, b in zip(*pair, strict=True)) for pair in zip(few, many, strict=True)]
        print(f"kept at TP={options.tp}, and as a share of today's: by RssAnon, by saved_tensors_hooks")
        rows = [(sequence, kind) for sequence in ("today", "sequence parallel") for kind in KINDS]
        for (sequence, kind), (seen, grown) in zip(rows, found, strict=True):
            of_hooks = "" if kind else f"   {seen / 2**20:7.2f} MiB {seen / found[0][0]:6.3f}"
            print(f"  {sequence:18} {kind or '':10} {grown / 2**20:7.2f} MiB {grown / found[0][1]:6.3f}{of_hooks}")
        folder = prepare(Path(name) / "steps", 2, options.width, LAYERS[0])
        seconds, sizes = run_ranks(steps, 2, folder, options.length, options.rounds, timeout=900)[0]
        without, sharded = (statistics.median(one[2:]) for one in seconds)
        print(f"forward and backward at TP=2: {without:.3f} s, {sharded:.3f} s: {sharded / without:.3f}")
        print(f"collectives of a step: {sizes[0]} bytes, {sizes[1]} bytes")


if __name__ == "__main__":
    main()
