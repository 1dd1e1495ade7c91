"""python -m benchmarks.selective_checkpointing [--tp 4] [--length 4096]

What a Llama-3.1-8B layer of one rank keeps for the backward with no activation checkpointing, selective and full, each
without and with sequence parallelism: in bf16, on tensors without data, attention fused as on a GPU. What is alive at
the end of the forward of 4 layers, less that of 2; with the bytes that the collectives of forward and backward move (an
all-reduce as an all-gather and a reduce-scatter), and the floating-point operations.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
from collections import Counter
from pathlib import Path

from autotp_plan.runtime.verify.workers import run_ranks

KINDS = (None, "selective", "full")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 512, "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}  # fmt: skip


def alive(plan: Path, length: int, kind: str | None) -> tuple[int, int, int]:
    """Of one rank: bytes alive after the forward, bytes of collectives, and floating-point operations of a step."""
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime.estimate.fake_internals import Watch, count_operations, fused_attention
    from autotp_plan.runtime.estimate.fake_rank import fake_rank
    from autotp_plan.runtime.loading.activation_checkpointing import use_activation_checkpointing
    from autotp_plan.schemas.plan.document import Plan

    if dist.is_initialized():
        dist.destroy_process_group()
    model, ranks, mode = fake_rank(Plan.read(plan), 0, 1, torch.bfloat16)
    if kind is not None:
        use_activation_checkpointing(model, kind)
    moved: Counter[str] = Counter()
    watch = Watch(lambda name, _, size: moved.update({name: size}), held=[*model.parameters(), *model.buffers()])
    with mode, watch, fused_attention(), count_operations() as operations:
        tokens = torch.zeros(1, length, dtype=torch.long, device=ranks.device)
        output = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        gc.collect()
        bytes_alive = watch.live
        output.float().sum().backward()
    moved["allreduce_"] *= 2
    return bytes_alive, moved.total(), int(operations.get_total_flops())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    print(f"a layer of Llama-3.1-8B, TP={options.tp}, {options.length} tokens, bf16")
    without: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.tp)
        for sequence, kind in itertools.product(("", "sequence parallel"), KINDS):
            few, many = (
                run_ranks(alive, 1, Path(name) / f"{n}{sequence}.json", options.length, kind, timeout=600)[0]
                for n in (2, 4)
            )
            size, moved, work = ((more - less) / 2 for more, less in zip(many, few, strict=True))
            without = without or [size, moved, work]
            print(
                f"{sequence:18} {kind or 'none':10} {size / 2**20:8.1f} MiB {size / without[0]:6.3f}   "
                f"communicated {moved / 2**20:.1f} MiB {moved / without[1]:.3f}   operations {work / without[2]:.3f}"
            )


def prepare(folder: Path, tp_size: int) -> None:
    """Plans of 2 and of 4 layers, without and with sequence parallelism."""
    from autotp_plan.planner import compile_plan

    for layers, sequence in itertools.product((2, 4), ("", "sequence parallel")):
        (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
        plan = compile_plan(folder, tp_size=tp_size, sequence_parallel=bool(sequence))
        (folder / f"{layers}{sequence}.json").write_text(plan.to_json())


if __name__ == "__main__":
    main()
