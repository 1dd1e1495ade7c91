"""The proof that `verify` makes, for the models and the optimizer steps of tests. Errors are absolute.

`gradients` and `dense_steps` run in the test's process, all else on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autotp_plan.runtime.verify import compare, optimizer_steps
from autotp_plan.runtime.verify.float64_passes import (
    Forward,
    Numbers,
    Read,
    causal_lm,
    dense_reader,
    run_passes,
    shard_reader,
)
from autotp_plan.runtime.verify.optimizer_steps import Steps, Training
from tests.helpers.models import batch, eager_experts

NUM_STEPS = 5
EPS = 1e-5
"""AdamW's eps: smaller than in `verify`, so that smaller errors of gradients show."""


def gradients(model: nn.Module, forward: Forward = causal_lm) -> Numbers:
    """The dense model's loss and logits of two passes, and every parameter's gradient."""
    return _passes(model, dense_reader(model), [name for name, _ in model.named_parameters()], forward)


def sharded_gradients(
    model: nn.Module, names: Sequence[str], forward: Forward = causal_lm, promote: bool = True
) -> Numbers:
    """As `gradients`, of this rank's shards of the parameters `names`."""
    return _passes(model, shard_reader(model), names, forward, promote)


def _passes(model: nn.Module, read: Read, names: Sequence[str], forward: Forward, promote: bool = True) -> Numbers:
    found = run_passes(model, read, names, batch, forward=forward, promote=promote)
    for kind in ("gradient", "accumulated"):
        assert found[kind].keys() == set(names), f"without a gradient: {set(names) - found[kind].keys()}"
    return found


def errors_against(dense: Numbers, model: nn.Module, plan: Any, forward: Forward = causal_lm) -> dict[str, float]:
    """By kind and name the largest error of a sharded model's numbers."""
    return errors(dense, sharded_gradients(model, list(dense["gradient"]), forward), plan)


def errors(dense: Numbers, local: Numbers, plan: Any) -> dict[str, float]:
    """By kind and name the largest error on any TP rank: a collective."""
    mine = compare.errors(dense, local, plan.document, plan.ranks.tp_rank, compare.absolute_error)
    return _over_ranks(mine, plan)


def differences(first: Numbers, second: Numbers, plan: Any) -> dict[str, float]:
    """As `errors`, between two runs of one sharded model."""
    mine = {
        kind: {name: compare.absolute_error(value, second[kind][name]) for name, value in values.items()}
        for kind, values in first.items()
    }
    return _over_ranks(mine, plan)


def _over_ranks(local: dict[str, dict[str, float]], plan: Any) -> dict[str, float]:
    flat = {f"{kind} {name}": error for kind, errors in local.items() for name, error in errors.items()}
    worst = torch.tensor([flat[key] for key in sorted(flat)], dtype=torch.float64)
    if plan.ranks.tp_size > 1:
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=plan.ranks.tp_group)
    return dict(zip(sorted(flat), worst.tolist(), strict=True))


def compare_sharded(
    plan_file: Path, weights: Path, dense_file: Path, model: Any = None, forward: Forward = causal_lm
) -> dict[str, float]:
    """The errors of a model that is loaded by a plan, against the dense numbers in `dense_file`."""
    from autotp_plan.runtime import load_plan

    plan = load_plan(plan_file)
    options = eager_experts(torch.float64) if model is None else {}
    sharded = plan.load_model(weights, model=model, dtype=torch.float64, **options).train()
    return errors_against(torch.load(dense_file), sharded, plan, forward)


def training(dp_size: int = 1, accumulation: int = 1) -> Training:
    """The optimizer steps of tests."""
    return Training(batches=batch, num_steps=NUM_STEPS, eps=EPS, dp_size=dp_size, accumulation=accumulation)


def dense_steps(model: nn.Module, dp_size: int = 1, forward: Forward = causal_lm, accumulation: int = 1) -> Steps:
    """(loss, gradient norm) of each optimizer step of the dense model."""
    return optimizer_steps.dense_steps(model, training(dp_size, accumulation), forward)


def engine_settings(zero_stage: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed config that does what `dense_steps` does."""
    return training(accumulation=accumulation).engine_config(zero_stage, **changes)


def engine_steps(
    plan: Any, model: nn.Module, zero_stage: int, forward: Forward = causal_lm, accumulation: int = 1, **changes: Any
) -> Steps:
    """(loss, gradient norm) of each optimizer step of the DeepSpeed engine."""
    with _recorded_norms() as norm:
        return optimizer_steps.engine_steps(
            plan,
            model,
            training(plan.ranks.dp_size, accumulation),
            zero_stage=zero_stage,
            forward=forward,
            norm=norm,
            **changes,
        )


@contextmanager
def _recorded_norms() -> Iterator[Callable[[Any], float]]:
    """The norm that the engine says it had, or else the one that it clipped at: ZeRO 0 in float32 does not say it."""
    import deepspeed.runtime.engine as engine_module

    norms: list[float] = []
    clip = engine_module.clip_grad_norm_

    def recording(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        norms.append(float(norm))
        return norm

    def norm_of(engine: Any) -> float:
        said = engine.get_global_grad_norm()
        return float(norms[-1] if said is None else said)

    engine_module.clip_grad_norm_ = recording
    try:
        yield norm_of
    finally:
        engine_module.clip_grad_norm_ = clip
