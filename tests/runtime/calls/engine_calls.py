"""Each method of DeepSpeedEngine that has to do with weights, as a call that gives numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[Any, Path], Any]

STAGES = {"clip_fp32_gradients": 0, "buffered_allreduce_fallback": 0, "no_sync": 0,
          "offload_states + reload_states": 3, "empty_partition_cache": 3}  # fmt: skip
"""The ZeRO stage of each; 1 of the others."""


def config_of(call: str) -> dict[str, Any]:
    """The DeepSpeed config for a call."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": STAGES.get(call.partition(":")[0], 1)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def loss_of(engine: Any, seed: int = 3) -> Any:
    from tests.helpers.models import batch

    tokens = batch(seed)
    return engine(input_ids=tokens, labels=tokens, use_cache=False).loss


def step(engine: Any, seed: int = 3, times: int = 1) -> float:
    """The loss of a batch before an optimizer step of it."""
    for _ in range(times):
        loss = loss_of(engine, seed)
        engine.backward(loss)
        engine.step()
    return float(loss.detach())


def scaled(engine: Any) -> None:
    engine.scale(loss_of(engine)).backward()
    engine.step()


def no_sync(engine: Any) -> None:
    with engine.no_sync():
        engine.backward(loss_of(engine))
    engine.backward(loss_of(engine, 4))
    engine.step()


def coalesced(engine: Any) -> None:
    with engine.coalesce_grad_reduction():
        for seed in (3, 4):
            engine.backward(loss_of(engine, seed))
    engine.step()


def boundaries(engine: Any) -> bool:
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss_of(engine))
    engine.step()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss_of(engine, 4))
    boundary = bool(engine.is_gradient_accumulation_boundary())
    engine.step()
    return boundary


def clipped(engine: Any) -> list[float]:
    engine.backward(loss_of(engine))
    engine.clip_fp32_gradients()
    return engine.module.model.norm.weight.grad.tolist()


def bucket(engine: Any) -> None:
    engine.backward(loss_of(engine))
    engine.buffered_allreduce_fallback()
    engine.step()


def saved_and_loaded(engine: Any, folder: Path) -> list[float]:
    step(engine)
    engine.save_checkpoint(str(folder), tag="here")
    first = step(engine, times=2)
    engine.load_checkpoint(str(folder), tag="here")
    return [first, step(engine, times=2)]


def batches(engine: Any) -> list[int]:
    from tests.helpers.models import batch

    loader = engine.deepspeed_io([batch(seed)[0] for seed in range(8)], batch_size=2)
    return next(iter(loader)).tolist()


def offloaded(engine: Any) -> None:
    step(engine)
    engine.offload_states()
    engine.reload_states()


def module_states(engine: Any) -> int:
    return len(engine.module_state_dict())


ENGINE: dict[str, Call] = {
    "forward": lambda engine, _: float(loss_of(engine).detach()),
    "backward": lambda engine, _: step(engine),
    "backward: twice the loss": lambda engine, _: engine.backward(loss_of(engine) * 2),
    "backward: no loss": lambda engine, _: engine.backward(torch.ones(())),
    "step": lambda engine, _: step(engine, times=3),
    "step: without backward": lambda engine, _: engine.step(),
    "scale": lambda engine, _: scaled(engine),
    "eval": lambda engine, _: [engine.eval(), float(loss_of(engine).detach())],
    "train": lambda engine, _: [engine.train(), float(loss_of(engine).detach())],
    "zero_grad": lambda engine, _: engine.zero_grad(),
    "no_sync": lambda engine, _: no_sync(engine),
    "coalesce_grad_reduction": lambda engine, _: coalesced(engine),
    "allreduce_gradients": lambda engine, _: engine.allreduce_gradients(),
    "set_gradient_accumulation_boundary + is_gradient_accumulation_boundary": lambda engine, _: boundaries(engine),
    "set_train_batch_size": lambda engine, _: engine.set_train_batch_size(4),
    "set_train_micro_batch_size": lambda engine, _: engine.set_train_micro_batch_size(1),
    "get_global_grad_norm": lambda engine, _: (step(engine), float(engine.get_global_grad_norm()))[1],
    "was_step_applied": lambda engine, _: (step(engine), engine.was_step_applied())[1],
    "get_lr": lambda engine, _: engine.get_lr(),
    "get_mom": lambda engine, _: engine.get_mom(),
    "get_type": lambda engine, _: engine.get_type(),
    "clip_fp32_gradients": lambda engine, _: clipped(engine),
    "buffered_allreduce_fallback": lambda engine, _: bucket(engine),
    "module_state_dict": lambda engine, _: module_states(engine),
    "load_module_state_dict": lambda engine, _: engine.load_module_state_dict(
        {"module": dict(engine.module.named_parameters())}
    ),
    "save_checkpoint + load_checkpoint": saved_and_loaded,
    "compile": lambda engine, _: engine.compile(backend="eager"),
    "offload_states + reload_states": lambda engine, _: offloaded(engine),
    "empty_partition_cache": lambda engine, _: engine.empty_partition_cache(),
    "deepspeed_io": lambda engine, _: batches(engine),
    "destroy": lambda engine, _: engine.destroy(),
    "train_batch_size": lambda engine, _: engine.train_batch_size(),
    "get_batch_info": lambda engine, _: [number() for number in engine.get_batch_info()],
    "load_universal_checkpoint": lambda engine, _: engine.load_universal_checkpoint(),
    "is_compiled": lambda engine, _: engine.is_compiled,
}

FUNCTIONS: dict[str, Call] = {
    "safe_get_full_fp32_param": lambda engine, _: read(engine, "safe_get_full_fp32_param"),
    "safe_get_full_grad": lambda engine, _: read(engine, "safe_get_full_grad"),
    "safe_get_full_optimizer_state": lambda engine, _: read(engine, "safe_get_full_optimizer_state", "exp_avg"),
    "safe_set_full_fp32_param": lambda engine, _: write(engine, "safe_set_full_fp32_param"),
    "safe_set_full_optimizer_state": lambda engine, _: write(engine, "safe_set_full_optimizer_state", "exp_avg"),
}


def read(engine: Any, function: str, *more: Any) -> Any:
    """What a function of deepspeed.utils gives of a replicated weight, and the sum of all squares of a shard."""
    import deepspeed.utils
    import torch.distributed

    step(engine)
    engine.backward(loss_of(engine))
    given = getattr(deepspeed.utils, function)
    full = given(engine.module.model.norm.weight, *more)
    shard = given(engine.module.get_parameter("model.layers.0.mlp.up_proj.weight"), *more).double().square().sum()
    torch.distributed.all_reduce(shard)
    engine.step()
    return [full.tolist(), float(shard)]


def write(engine: Any, function: str, *more: Any) -> None:
    """Double a weight or its state."""
    import deepspeed.utils

    step(engine)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        parameter = engine.module.get_parameter(name)
        value = getattr(deepspeed.utils, function.replace("set", "get"))(parameter, *more)
        getattr(deepspeed.utils, function)(parameter, value * 2, *more)


CALLS = {"DeepSpeedEngine": ENGINE, "deepspeed.utils": FUNCTIONS}
"""By section of docs/calls.md."""


def numbers(engine: Any) -> list[float]:
    """The losses of three steps."""
    return [step(engine, seed) for seed in (5, 6, 5)]


TOGETHER = frozenset({
    "forward", "eval", "train", "get_lr", "get_mom", "get_type", "deepspeed_io", "train_batch_size", "get_batch_info",
    "load_universal_checkpoint", "is_compiled", "module_state_dict", "load_module_state_dict",
})  # fmt: skip
"""Calls of one engine, one after the other."""
