"""One rank of one run of `benchmarks.training`: load, train a few steps, write down when, what was read, what was sent.

python -m benchmarks.training_rank JOB.json, started by `benchmarks.training` with RANK and WORLD_SIZE set. Each system
is written as its own documentation says; what they share is the batches, the optimizer (torch's AdamW) and no clipping.
It does not know what the figures are compared with.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAM: dict[str, Any] = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01, "fused": True}
"""Fused, as Trainer and DeepSpeed take it by themselves: the same for all, and the least of a step. With the usual eps,
a gradient of 1e-8 counts as much as one of 1: rounding would decide the first steps."""

Step = Callable[[Any], float]


def deepspeed_config(tp_size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "tensor_parallel": {"autotp_size": tp_size},
        "steps_per_print": 10**9,
    }


def engine_step(engine: Any) -> Step:
    def step(tokens: Any) -> float:
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def plain_step(model: Any) -> Step:
    """The loop of torch alone. The fused optimizer takes no group in which only some parameters are DTensors."""
    import torch

    by_type: dict[type, list[Any]] = {}
    for parameter in model.parameters():
        by_type.setdefault(type(parameter.data), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in by_type.values()], **ADAM)

    def step(tokens: Any) -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def start_ours(job: dict[str, Any]) -> Step:
    from autotp_plan.runtime import load_plan

    plan = load_plan(Path(job["shards"]) / "autotp_plan.json")
    model = plan.load_model(job["shards"])
    engine, *_ = plan.initialize(model, config=deepspeed_config(job["tp_size"]))
    return engine_step(engine)


def start_autotp(job: dict[str, Any]) -> Step:
    import deepspeed
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"])
    config = deepspeed_config(job["tp_size"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine_step(engine)


def start_transformers(job: dict[str, Any]) -> Step:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(tp_plan="auto", tp_size=job["tp_size"])
    return plain_step(AutoModelForCausalLM.from_pretrained(job["checkpoint"], distributed_config=split).train())


def start_dense(job: dict[str, Any]) -> Step:
    from transformers import AutoModelForCausalLM

    return plain_step(AutoModelForCausalLM.from_pretrained(job["checkpoint"]).to(job["device"]).train())


SYSTEMS = {
    "ours": start_ours,
    "autotp": start_autotp,
    "transformers": start_transformers,
    "dense": start_dense,
}


def import_all(system: str) -> None:
    """What a program for this system has at its top, with what transformers would import at its first use anyway."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    if system == "ours":
        from autotp_plan.runtime import load_plan  # noqa: F401
    elif system == "autotp":
        import deepspeed  # noqa: F401
    elif system == "transformers":
        from transformers.distributed import DistributedConfig  # noqa: F401


def batches(job: dict[str, Any]) -> list[Any]:
    """Two batches of random tokens that take turns: a model learns them by heart, and its loss falls."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (job["batch_size"], job["seq_length"])
    return [torch.randint(job["vocab_size"], shape, generator=generator).to(job["device"]) for _ in range(2)]


def pss() -> int:
    """Bytes of this process, a page that several share counted in parts; what a file backs is in it."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")


def bytes_read() -> int:
    """Bytes that this process asked for with read() so far, from the page cache or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def count_sent(step: Callable[[], object]) -> dict[str, int]:
    """The collectives of one step, and the bytes that this rank handed to them (to a gather: the bytes of its part).

    Every collective of torch.distributed is an operator, DeepSpeed's and DTensor's too: of c10d or of the functional
    collectives. Those of a group of one rank send nothing and are counted on their own.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    found = {"all_reduces": 0, "all_reduce_bytes": 0, "others": 0, "other_bytes": 0, "alone": 0, "alone_bytes": 0}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented  # DTensor takes it apart first
            library, _, name = func.name().partition("::")
            if library in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "deepspeed"):
                leaves = tree_leaves((args, kwargs))
                tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
                if size := group_size(leaves):
                    is_sum = "all_reduce" in name or "allreduce" in name
                    what, sent = ("all_reduces", "all_reduce_bytes") if is_sum else ("others", "other_bytes")
                    if size == 1:
                        what, sent = "alone", "alone_bytes"
                    found[what] += 1
                    found[sent] += sum(t.numel() * t.element_size() for t in (tensors if is_sum else tensors[-1:]))
            return func(*args, **(kwargs or {}))

    with Counting():
        step()
    return found


def group_size(arguments: list[Any]) -> int:
    """The number of ranks of the process group among a collective's arguments, 0 when it has none (a wait)."""
    import torch
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return int(torch.distributed.ProcessGroup.unbox(argument).size())
        if isinstance(argument, str):
            with contextlib.suppress(RuntimeError):
                return int(_resolve_process_group(argument).size())  # type: ignore[arg-type]
    return 0


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    times: dict[str, float] = {}

    def now(event: str) -> None:
        if job["device"] != "cpu":
            import torch

            torch.cuda.synchronize()
        times[event] = time.monotonic()

    import_all(job["system"])
    import torch
    import torch.distributed as dist
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    times["imports"] = time.monotonic()
    read = bytes_read()
    if job["device"] != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if world_size > 1:
        store = dist.FileStore(job["store"], world_size)  # type: ignore[attr-defined]
        dist.init_process_group(job["backend"], store=store, rank=rank, world_size=world_size)
    step = SYSTEMS[job["system"]](job)
    now("ready")
    ready_cpu = time.process_time()
    read = bytes_read() - read
    meet = dist.barrier if world_size > 1 else lambda: None
    meet()
    pss_ready = pss()
    meet()
    tokens = batches(job)
    losses, seconds, cpu_seconds = [], [], []
    for number in range(job["num_steps"]):
        meet()
        began, cpu_began = time.perf_counter(), time.process_time()
        losses.append(step(tokens[number % 2]))
        now("trained")
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        if not number:
            times["first_step"] = times["trained"]
    meet()
    pss_trained = pss()
    meet()
    result = {
        "times": times,
        "bytes_read": read,
        "pss_ready": pss_ready,
        "pss_trained": pss_trained,
        "losses": losses,
        "step_seconds": seconds,
        "step_cpu_seconds": cpu_seconds,
        "ready_cpu_seconds": ready_cpu,
        "cuda_bytes": torch.cuda.max_memory_allocated() if job["device"] != "cpu" else None,
        "cuda_held": torch.cuda.memory_allocated() if job["device"] != "cpu" else None,
        "sent": count_sent(lambda: step(tokens[0])),
    }
    Path(job["results"], f"result-{rank}.json").write_text(json.dumps(result))
    meet()
    os._exit(0)  # nothing to tidy up, and gloo's threads take their time


if __name__ == "__main__":
    main()
