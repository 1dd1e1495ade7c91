"""Optimizer steps in float32, which both the DeepSpeed engine and the dense model take: losses and gradient norms."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from autotp_plan.runtime.verify.float64_passes import ADAM, BatchOf, Forward, by_class
from autotp_plan.schemas.errors import Fault, OptionError

ADAMW = "adamw"
Steps = list[tuple[float, float]]
"""Loss, averaged over the batch of a step, and norm of the gradients before they are clipped, of each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Gradients clipped at norm 1, and AdamW or another optimizer. A step has `dp_size` * `accumulation` batches."""

    batches: BatchOf
    num_steps: int = 3
    eps: float = ADAM["eps"]
    dp_size: int = 1
    accumulation: int = 1
    optimizer: str = ADAMW

    @property
    def adam(self) -> dict[str, float]:
        """AdamW's arguments."""
        return {**ADAM, "eps": self.eps}

    def seed(self, step: int, micro: int, dp_rank: int) -> int:
        """The seed of one batch."""
        return 10 + step + 100 * micro + 1000 * dp_rank

    def engine_config(self, zero_stage: int, **changes: Any) -> dict[str, Any]:
        """The DeepSpeed config that trains so."""
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": zero_stage},
            "optimizer": {"type": "AdamW", "params": {**self.adam, "torch_adam": True}},
            "steps_per_print": 10**9,
            **changes,
        }
        if self.optimizer != ADAMW:  # then it is given to the engine, which does not flatten parameters for it
            del config["optimizer"], config["zero_optimization"]
        return config


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimizer of a model, with its class's own hyperparameters where it is not AdamW.

    torch's Muon, which takes nothing else, steps the matrices alone.
    """
    if training.optimizer == ADAMW:
        return torch.optim.AdamW(model.parameters(), **training.adam)  # type: ignore[arg-type]
    kind = optimizer_class(training.optimizer)
    if issubclass(kind, torch.optim.Muon):
        return torch.optim.Muon([parameter for parameter in model.parameters() if parameter.dim() == 2])
    made: torch.optim.Optimizer = kind(model.parameters())
    return made


_NOT_COMPARED = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)


def orthogonalised(gradient: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz (https://kellerjordan.github.io/posts/muon/) in float64, for comparing steps of Muon.

    torch iterates in bfloat16, where the last digit of a gradient changes percents of an update, sharded or not.
    """
    first, second, third = coefficients
    is_tall = gradient.size(0) > gradient.size(1)
    matrix = gradient.double().t() if is_tall else gradient.double()
    matrix = matrix / matrix.norm().clamp(min=eps)
    for _ in range(steps):
        gram = matrix @ matrix.t()
        matrix = first * matrix + (second * gram + third * gram @ gram) @ matrix
    result: Tensor = matrix.t() if is_tall else matrix
    return result.to(gradient.dtype)


def optimizer_class(name: str) -> Any:
    """The class that `verify --optimizer` names: one of torch.optim in any case, or `package.module.Class`.

    Raises:
        OptionError: there is none.
    """
    module, _, cls = name.rpartition(".")
    try:
        if module:
            kind = getattr(importlib.import_module(module), cls, None)
        else:
            kind = {known.lower(): value for known, value in vars(torch.optim).items()}.get(cls.lower())
    except ImportError:
        kind = None
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind not in _NOT_COMPARED:
        return kind
    raise OptionError(
        Fault(
            code="unknown-optimizer",
            what="there is no such optimizer to compare",
            where="--optimizer",
            got=name,
            expected="a class of torch.optim (adamw, adafactor, muon, ...), or the path of one: package.module.Class",
            next="--optimizer adamw, or transformers.Adafactor",
        )
    )


def dense_steps(model: nn.Module, training: Training, forward: Forward = by_class) -> Steps:
    """Loss and gradient norm of each step of the unsharded model."""
    optimizer = make_optimizer(model, training)
    history = []
    for step in range(training.num_steps):
        losses = []
        for micro in range(training.accumulation):
            for dp_rank in range(training.dp_size):
                loss, _ = forward(model, training.batches(training.seed(step, micro, dp_rank)))
                (loss / training.dp_size / training.accumulation).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.item())
        norm = _clip(model)
        optimizer.step()
        model.zero_grad()  # as an engine does, also of what the optimizer does not step
        history.append((sum(losses) / len(losses), norm))
    return history


def engine_steps(
    plan: Any,
    model: nn.Module,
    training: Training,
    *,
    zero_stage: int = 1,
    forward: Forward = by_class,
    norm: Callable[[Any], Any] = lambda engine: engine.get_global_grad_norm(),
    **changes: Any,
) -> Steps:
    """As `dense_steps`, of a DeepSpeed engine; every rank must call it.

    Args:
        plan: the TrainingPlan that `model` was loaded by.
        model: this rank's shards, in training mode.
        training: the steps; the plan's mesh must have `training.dp_size` data-parallel ranks.
        zero_stage: 0 to 3.
        forward: gives loss and logits.
        norm: asked for the gradient norm after each step.
        **changes: replace entries of the DeepSpeed config.
    """
    ranks = plan.ranks
    given = {} if training.optimizer == ADAMW else {"optimizer": make_optimizer(model, training)}
    engine, _, _, _ = plan.initialize(model, config=training.engine_config(zero_stage, **changes), **given)
    history = []
    for step in range(training.num_steps):
        losses = []
        for micro in range(training.accumulation):
            loss, _ = forward(engine, training.batches(training.seed(step, micro, ranks.dp_rank)))
            engine.backward(loss)
            losses.append(loss.detach().float())
            if training.optimizer != ADAMW:  # without ZeRO, an engine does not keep the norm
                gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
                found = torch.nn.utils.get_total_norm(gradients)
            engine.step()
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean, group=ranks.dp_group)
        history.append(
            ((mean / training.dp_size).item(), float(norm(engine) if training.optimizer == ADAMW else found))
        )
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
    torch._foreach_mul_(gradients, min(1.0, 1.0 / (norm + 1e-6)))
    return norm
