"""python -m benchmarks.step_checks [--tp 2] [--rounds 6] [--block 10] [--hidden 512] [--layers 8] [--batch 2]

What all checks of a training step cost together. One engine trains in blocks of steps, with the checks and without in
turns: the comparison of batches is that of a module that computes nothing, called before the model, and the lookup of
embeddings is replaced by one that does not check token ids; the engine looks for NaN and inf, or does not. Then each
check alone, many times, as it is lost in the noise of steps. Prints the share of all
steps' time, and how much two halves of the steps without checks differ.

The checks: the batches of the TP ranks are compared at every 100th forward, and counted at each; token ids are in the
vocabulary; an optimizer was adapted to the sharded model, if it needs to be; loss and norm are finite, which without
ZeRO in float32 the ranks compare every tenth step (the mean of 200 steps). All others are made once, before training.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotp_plan.runtime.verify.workers import run_ranks
from benchmarks.batch_check import DEFAULT_EVERY, Nothing, write_model

TARGET = 0.005


def start(folder: Path, tp_size: int, options: dict[str, int]) -> tuple[Any, Any]:
    """A plan, and an engine that compares no batches."""
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    plan = TrainingPlan(compile_plan(folder, tp_size=tp_size))
    config = {
        "train_micro_batch_size_per_gpu": options["batch"],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    model = plan.load_model(folder, check_batches_every=None).train()
    return plan, plan.initialize(model, config=config)[0]


def lookup(layer: Any, input: Any) -> Any:
    """The vocabulary-parallel embedding without its check of token ids."""
    import torch.nn.functional as F

    from autotp_plan.runtime.tensor_parallel.collectives import sum_over_ranks
    from autotp_plan.runtime.tensor_parallel.embedding import find_held

    local, mine = find_held(input, layer.held)
    output = F.embedding(local, layer.local_weight)
    return sum_over_ranks(output.masked_fill(~mine.unsqueeze(-1), 0.0), layer.mp_group)


def measure(folder: Path, tp_size: int, options: dict[str, int]) -> dict[str, float]:
    """Median seconds on this rank."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from autotp_plan.runtime.data.batch_check import batch_comparison
    from autotp_plan.runtime.tensor_parallel.embedding import VocabParallelEmbedding
    from autotp_plan.schemas.upstream import replaced

    plan, engine = start(folder, tp_size, options)
    comparing, nothing = Nothing(batch_comparison(plan.ranks, DEFAULT_EVERY)), Nothing()
    tokens = torch.randint(4000, (options["batch"], options["length"]), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(plan.ranks.device)
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}

    def seconds_of(call: Callable[[], Any]) -> float:
        get_accelerator().synchronize()
        began = time.perf_counter()
        call()
        get_accelerator().synchronize()
        return time.perf_counter() - began

    def step(first: Any) -> None:
        first(**inputs)
        loss = engine(**inputs, use_cache=False).loss
        engine.backward(loss)
        engine.step()

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(4):
        step(comparing)
    for _ in range(options["rounds"]):
        for name, first in (("with", comparing), ("without", nothing)):
            call = functools.partial(step, first)
            off = replaced(VocabParallelEmbedding, "forward", lookup)
            engine.finite_check.stops = name == "with"
            with off if name == "without" else contextlib.nullcontext():
                seconds[name] += [seconds_of(call) for _ in range(options["block"])]
    found = {name: statistics.median(each) for name, each in seconds.items()}
    found |= {f"{name}, fastest": min(each) for name, each in seconds.items()}
    halves = [statistics.median(seconds["without"][at::2]) for at in (0, 1)]
    found["noise"] = abs(halves[0] / halves[1] - 1)
    return {**found, **alone(plan, tokens, engine, seconds_of)}


def alone(plan: Any, tokens: Any, engine: Any, seconds_of: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """Seconds of each check, once."""
    import torch

    from autotp_plan.runtime.data.batch_check import batch_comparison
    from autotp_plan.runtime.optimizers import choose
    from autotp_plan.runtime.optimizers.finite import FiniteCheck

    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}

    def forward(every: int | None) -> float:
        model = Nothing(batch_comparison(plan.ranks, every))
        model(**inputs)  # the first names what differs
        return statistics.median(seconds_of(lambda: model(**inputs)) for _ in range(200))

    check, loss = FiniteCheck(engine, plan.ranks.dp_rank), torch.ones((), device=plan.ranks.device)

    def finite() -> None:
        check.see(loss)
        with check.during_step():
            engine.global_steps += 1

    none = forward(None)
    vocabulary = engine.module.config.vocab_size
    optimizer = engine.basic_optimizer
    return {
        "comparing batches": max(0.0, forward(1) - none),
        "counting forwards": max(0.0, forward(10**9) - none),
        "token ids": statistics.median(seconds_of(lambda: tokens + (tokens - tokens % vocabulary)) for _ in range(200)),
        "optimizer": statistics.median(
            seconds_of(lambda: choose._check_first_step(optimizer, (), {})) for _ in range(200)
        ),
        "finite loss and norm": statistics.mean(seconds_of(finite) for _ in range(200)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"tp": 2, "rounds": 6, "block": 10, "hidden": 512, "layers": 8, "batch": 2, "length": 128}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as work:
        write_model(Path(work), options)
        found = run_ranks(measure, options["tp"], Path(work), options["tp"], options, timeout=900)[0]
    step = found["without"]
    noise = found.pop("noise")
    for ending, name in (("", "median"), (", fastest", "fastest")):
        without, with_checks = found.pop("without" + ending), found.pop("with" + ending)
        print(f"{f'a step without checks, {name}':36}{without * 1e3:10.3f} ms")
        print(f"{f'a step with checks, {name}':36}{with_checks * 1e3:10.3f} ms  {with_checks / without - 1:+.2%}")
    print(f"{'two halves of those without differ by':36}{noise:10.2%}")
    total = 0.0
    for name, seconds in found.items():
        each = seconds / DEFAULT_EVERY if name == "comparing batches" else seconds
        total += each
        often = f", one step of {DEFAULT_EVERY}" if name == "comparing batches" else ""
        print(f"{name + often:36}{seconds * 1e3:10.4f} ms  {each / step:.5%} of all steps")
    print(f"{'all checks':36}{total * 1e3:10.4f} ms  {total / step:.5%} of all steps")
    print(f"target: below {TARGET:.1%}: {'met' if total / step < TARGET else 'NOT met'}")
    agreed = found["comparing batches"] / DEFAULT_EVERY + found["counting forwards"] + found["finite loss and norm"]
    print(f"what ranks agree on, of 100 ms      {agreed * 1e3:10.4f} ms  {agreed / 0.1:.5%}; target: below 0.2 %")


if __name__ == "__main__":
    main()
