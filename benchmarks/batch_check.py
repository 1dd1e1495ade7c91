"""python -m benchmarks.batch_check [--tp 2] [--rounds 30] [--hidden 512] [--layers 8] [--batch 2] [--length 128]

What it costs to compare the TP ranks' batches: steps that compare and steps that do not, in turns, on one engine; and
the comparison alone, many times, which is not lost in the noise of steps. Prints medians, and the share of all steps'
time when every 100th compares (the default). On a CUDA machine the ranks are GPUs and talk over nccl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autotp_plan.runtime.data.batch_check import CompareBatch, batch_comparison
from autotp_plan.runtime.verify.workers import run_ranks

DEFAULT_EVERY = 100


class Nothing(nn.Module):
    """A model that computes nothing, and compares its batches by `compare`."""

    def __init__(self, compare: CompareBatch | None = None) -> None:
        super().__init__()
        self.compare = compare

    def forward(self, **inputs: Tensor) -> None:
        """Take any inputs."""
        if self.compare is not None:
            self.compare(self.training, (), inputs)


def measure(folder: Path, tp_size: int, options: dict[str, int]) -> dict[str, float]:
    """Median seconds of a step without and with the comparison, on this rank."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    plan = TrainingPlan(compile_plan(folder, tp_size=tp_size))
    model = plan.load_model(folder, check_batches_every=2).train()
    config = {
        "train_micro_batch_size_per_gpu": options["batch"],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = plan.initialize(model, config=config)
    tokens = torch.randint(4000, (options["batch"], options["length"]), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(plan.ranks.device)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for step in range(2 * options["rounds"] + 4):
        get_accelerator().synchronize()
        began = time.perf_counter()
        loss = engine(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        get_accelerator().synchronize()
        if step >= 4:
            seconds["without" if step % 2 else "with"].append(time.perf_counter() - began)
    seconds["alone"] = []
    nothing = Nothing(batch_comparison(plan.ranks, 1))
    for _ in range(options["rounds"] + 1):
        began = time.perf_counter()
        nothing(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens))
        seconds["alone"].append(time.perf_counter() - began)
    del seconds["alone"][0]  # the first names what differs
    return {name: statistics.median(found) for name, found in seconds.items()}


def write_model(folder: Path, options: dict[str, int]) -> None:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        hidden_size=options["hidden"], intermediate_size=options["hidden"] * 11 // 4, vocab_size=4096,
        num_hidden_layers=options["layers"], num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tp": 2, "rounds": 30, "hidden": 512, "layers": 8, "batch": 2, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as work:
        write_model(Path(work), options)
        found = run_ranks(measure, options["tp"], Path(work), options["tp"], options, timeout=600)[0]
    names = {"without": "a step that does not compare", "with": "a step that compares", "alone": "the comparison alone"}
    for key, name in names.items():
        print(f"{name:30}{found[key] * 1e3:8.2f} ms")
    for every in (1, DEFAULT_EVERY):
        print(f"{f'one step of {every} compares':30}{found['alone'] / every / found['without']:8.4%} of all steps")


if __name__ == "__main__":
    main()
