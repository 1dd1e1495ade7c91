"""The numbers that a sharded model must have in common with the dense one, and how far they are apart.

Both models go through the same functions; only how a parameter is read differs, and the engine where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from autotp_plan.runtime.loading.local_shard import local_shard
from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.verify.float64 import PromoteToFloat64
from autotp_plan.runtime.verify.report import FLOAT64_TOLERANCE
from autotp_plan.schemas.plan.document import Plan

ADAM = {"lr": 2e-3, "eps": 1e-3, "weight_decay": 0.01}
"""A first Adam step is lr * g / (|g| + eps): with an eps near the rounding error of g, noise becomes a full step."""
CLIP = 1.0
ENGINE_STEPS = 3

Read = Callable[[str, bool], Tensor | None]
"""Value of the parameter of a name, or with True its gradient."""
Numbers = dict[str, dict[str, Tensor]]
"""`loss` and `logits` by forward pass; by parameter `gradient` after one backward pass, `accumulated` after two, and
`stepped`, its value after two optimizer steps.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Random tokens, of batches that both models see. Without padding, and yet with the padding token."""

    vocab_size: int
    length: int
    padding: int | None

    def __call__(self, seed: int) -> Tensor:
        tokens = torch.randint(self.vocab_size, (2, self.length), generator=torch.Generator().manual_seed(seed))
        if self.padding is not None and 0 <= self.padding < self.vocab_size:
            tokens[0, 0] = self.padding
        return tokens


def float64_numbers(model: nn.Module, read: Read, names: Sequence[str], batches: Batches) -> Numbers:
    """Three forward and backward passes and two optimizer steps, the first over two passes."""
    found: Numbers = {kind: {} for kind in ("loss", "logits", "gradient", "accumulated", "stepped")}
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM, foreach=False)  # type: ignore[arg-type]

    def backward(index: int) -> None:
        with PromoteToFloat64():
            loss, logits = _forward(model, batches(index))
            loss.backward()  # type: ignore[no-untyped-call]
        found["loss"][f"pass {index}"], found["logits"][f"pass {index}"] = loss.detach(), logits.detach()

    def record(kind: str) -> None:
        for name in names:
            tensor = read(name, kind != "stepped")
            if tensor is not None:
                found[kind][name] = tensor.detach().clone()

    backward(1)
    record("gradient")
    backward(2)
    record("accumulated")
    optimizer.step()
    optimizer.zero_grad()
    backward(3)
    optimizer.step()
    record("stepped")
    return found


def dense_reader(model: nn.Module) -> Read:
    """Reads a whole model; a parameter that the loss does not depend on has no gradient."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return lambda name, gradient: parameters[name].grad if gradient else parameters[name]


def shard_reader(model: nn.Module) -> Read:
    """Reads this rank's shards."""
    return lambda name, gradient: local_shard(model, name, gradient=gradient)


def errors(dense: Numbers, local: Numbers, plan: Plan, tp_rank: int) -> dict[str, dict[str, float]]:
    """The largest difference of each of this rank's numbers from the dense model's, as `difference` measures it."""
    layouts = {parameter.name: plan.layouts[parameter.layout] for parameter in plan.expanded()}
    found: dict[str, dict[str, float]] = {kind: {} for kind in dense}
    for kind, expected in dense.items():
        for name, whole in expected.items():
            layout = layouts.get(name)
            if layout is not None and layout.dim is not None:
                mine = take(whole.reshape(layout.shape), layout.rank_intervals(tp_rank), layout.dim)
                found[kind][name] = difference(mine, local[kind][name].reshape(mine.shape))
            else:
                found[kind][name] = difference(whole, local[kind][name])
    return found


def partial_gradients(dense: Numbers, local: Numbers, plan: Plan, group: Any) -> list[str]:
    """The parameters that are whole on every rank while each rank computed part of their gradient.

    Their gradients are not the dense model's, but the sum of them is. A collective: every rank must call it.
    """
    found = []
    for parameter in plan.expanded():
        expected = dense["gradient"].get(parameter.name)
        if expected is None or plan.layouts[parameter.layout].dim is not None:
            continue
        mine = local["gradient"][parameter.name]
        summed = mine.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        apart = torch.tensor(difference(expected, mine))
        dist.all_reduce(apart, op=dist.ReduceOp.MAX, group=group)
        if apart > FLOAT64_TOLERANCE >= difference(expected, summed):
            found.append(parameter.name)
    return found


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest absolute difference, over the largest magnitude expected where that is above 1."""
    if expected.shape != found.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    error = (expected.double() - found.double()).abs().max() / expected.double().abs().max().clamp(min=1.0)
    return error.item() if torch.isfinite(error) else math.inf


def dense_steps(model: nn.Module, batches: Batches) -> list[tuple[float, float]]:
    """(loss, gradient norm) of optimizer steps of the dense model, clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)  # type: ignore[arg-type]
    history = []
    for step in range(ENGINE_STEPS):
        loss, _ = _forward(model, batches(10 + step))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = _clip(model)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm))
    return history


def engine_steps(plan: Any, model: nn.Module, batches: Batches) -> list[tuple[float, float]]:
    """As `dense_steps`, of a DeepSpeed engine with ZeRO 1."""
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = plan.initialize(model, config=settings)
    history = []
    for step in range(ENGINE_STEPS):
        loss, _ = _forward(engine, batches(10 + step))
        engine.backward(loss)
        engine.step()
        history.append((loss.item(), float(engine.get_global_grad_norm())))
    engine.destroy()
    return history


def relative_errors(dense: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> dict[str, float]:
    """The relative error of each step's loss and gradient norm."""
    return {
        f"{what}, step {step}": abs(got - expected) / abs(expected) if math.isfinite(got) else math.inf
        for step, pair in enumerate(zip(dense, found, strict=True), 1)
        for what, expected, got in zip(("loss", "gradient norm"), *pair, strict=True)
    }


def _clip(model: nn.Module) -> float:
    """As `torch.nn.utils.clip_grad_norm_`, whose norm of a few million numbers in float32 is only right to 1e-5."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    torch._foreach_mul_(gradients, min(1.0, CLIP / (norm + 1e-6)))
    return norm


def _forward(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    return out.loss, out.logits
