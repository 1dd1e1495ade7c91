"""The dense and the sharded run of one model, number for number. `dense_*` run anywhere, `sharded_*` inside a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.runtime.verify.float64 import PromoteToFloat64
from tests.helpers.models import batch, eager_experts

ADAM = {"lr": 2e-3, "eps": 1e-5, "weight_decay": 0.01}
"""A first Adam step is lr * g / (|g| + eps): with an eps below the rounding error of g, noise becomes a full step."""
NUM_STEPS = 5
Forward = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def causal_lm(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits of a transformers causal LM."""
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    return out.loss, out.logits


def gradients(
    model: nn.Module, forward: Forward = causal_lm, passes: int = 2, float64: bool = True
) -> dict[str, Tensor]:
    """Loss, logits and every parameter's gradient over accumulated backward passes."""
    found: dict[str, Tensor] = {}
    with PromoteToFloat64() if float64 else contextlib.nullcontext():
        for index in range(passes):
            loss, logits = forward(model, batch(100 + index))
            loss.backward()
            found[f"loss {index}"], found[f"logits {index}"] = loss.detach(), logits.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def whole_gradients(
    model: nn.Module, plan: Any, forward: Forward = causal_lm, float64: bool = True
) -> dict[str, Tensor]:
    """As `gradients`, with the ranks' shards put together. Every rank of the TP group must call it."""
    from autotp_plan.runtime.loading.local_shard import local_shard
    from autotp_plan.runtime.tensor_parallel.collectives import gather_shards

    found = gradients(model, forward, float64=float64)
    found = {name: value for name, value in found.items() if not name.endswith("_shared")}
    ranks = plan.ranks
    for parameter in plan.document.expanded():
        layout = plan.document.layouts[parameter.layout]
        if layout.dim is not None and ranks.tp_size > 1:
            local = local_shard(model, parameter.name, gradient=True)
            assert local is not None, f"{parameter.name} has no gradient"
            local = local.reshape(layout.rank_shape(ranks.tp_rank))
            whole = gather_shards(local, ranks.tp_group, layout.intervals, layout.dim)
            found[parameter.name] = whole.reshape(plan.document.shape_of(parameter))
    return found


def largest_errors(dense: dict[str, Tensor], sharded: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute difference of each entry; both must have the same ones."""
    assert dense.keys() == sharded.keys(), dense.keys() ^ sharded.keys()
    return {name: (dense[name] - sharded[name]).abs().max().item() for name in dense}


def dense_steps(
    model: nn.Module, dp_size: int, forward: Forward = causal_lm, accumulation: int = 1
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each optimizer step of the unsharded model, clipped at 1.0."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    history = []
    for step in range(NUM_STEPS):
        losses = []
        for micro in range(accumulation):
            for dp_rank in range(dp_size):
                loss, _ = forward(model, batch(1000 * step + 10 * micro + dp_rank))
                (loss / dp_size / accumulation).backward()
                losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((sum(losses) / len(losses), norm.item()))
    return history


def engine_settings(zero_stage: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed config that does what `dense_steps` does."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "steps_per_print": 10**9,
        **changes,
    }


def engine_steps(
    plan: Any, model: nn.Module, zero_stage: int, forward: Forward = causal_lm, accumulation: int = 1, **changes: Any
) -> list[tuple[float, float]]:
    """(loss averaged over DP ranks, gradient norm) of each step of the DeepSpeed engine."""
    import deepspeed.runtime.engine as engine_module

    norms: list[float] = []
    clip = engine_module.clip_grad_norm_

    def recording_clip(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        norms.append(float(norm))
        return norm

    engine_module.clip_grad_norm_ = recording_clip  # ZeRO 0 in float32 keeps the norm to itself
    try:
        engine, _, _, _ = plan.initialize(model, config=engine_settings(zero_stage, accumulation, **changes))
        history = []
        for step in range(NUM_STEPS):
            losses = []
            for micro in range(accumulation):
                loss, _ = forward(engine, batch(1000 * step + 10 * micro + plan.ranks.dp_rank))
                engine.backward(loss)
                losses.append(loss.detach().float())
                engine.step()
            mean = torch.stack(losses).mean()
            torch.distributed.all_reduce(mean, group=plan.ranks.dp_group)
            norm = engine.get_global_grad_norm()
            history.append(((mean / plan.ranks.dp_size).item(), float(norm if norm is not None else norms[-1])))
        engine.destroy()
        return history
    finally:
        engine_module.clip_grad_norm_ = clip


def compare_sharded(
    plan_file: Path, weights: Path, dense_file: Path, model: Any = None, forward: Forward = causal_lm
) -> dict[str, float]:
    """Inside a rank: the largest error of each number of the sharded model against those saved in `dense_file`."""
    from autotp_plan.runtime import load_plan

    plan = load_plan(plan_file)
    options = eager_experts(torch.float64) if model is None else {}
    sharded = plan.load_model(weights, model=model, dtype=torch.float64, **options).train()
    return largest_errors(torch.load(dense_file), whole_gradients(sharded, plan, forward))
