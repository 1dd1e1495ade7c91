"""Small optimizers of every kind that people train with: elementwise, by tensor, by block, and over everything."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class PlainOptimizer(torch.optim.Optimizer):
    """Plain `update(gradient, parameter, state, group)`, subtracted with the learning rate."""

    def __init__(self, params: Any, lr: float = 1e-2, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self.update(parameter.grad, parameter, self.state[parameter], group)
                    parameter.sub_(update, alpha=group["lr"])

    @abstractmethod
    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What is subtracted from a parameter, before it is multiplied by the learning rate."""


def adam(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """An update of Adam, without its corrections of bias."""
    first = state.setdefault("exp_avg", torch.zeros_like(gradient))
    second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.01)
    return first / (second.sqrt() + 1e-8)


class Sophia(PlainOptimizer):
    """Elementwise: a clipped ratio of momentum and curvature."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 0.1)
        curvature = state.setdefault("hessian", torch.zeros_like(gradient)).lerp_(gradient.square(), 0.01)
        return (momentum / (curvature + 1e-12)).clamp(-1, 1)


class Lion(PlainOptimizer):
    """Elementwise: the sign of the momentum."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(gradient))
        update = momentum.lerp(gradient, 0.1).sign()
        momentum.lerp_(gradient, 0.01)
        return update


class Lamb(PlainOptimizer):
    """By tensor: Adam's update with the norm of the weight. Counts steps in its group, as apex does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step()

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        update = adam(gradient, state) / (1 - 0.9 ** group["step"]) + 0.01 * parameter
        return update * (parameter.norm() / update.norm()).clamp(max=10)


class Lars(PlainOptimizer):
    """By tensor: the gradient with the norm of the weight."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient * (parameter.norm() / gradient.norm().clamp(min=1e-12))


class NormedSgd(PlainOptimizer):
    """By tensor: gradients of norm 1."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / gradient.norm().clamp(min=1e-12)


class Shampoo(PlainOptimizer):
    """By tensor: preconditioned from both sides of a matrix, from the third step on; until then, SGD."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        matrix = gradient.reshape(gradient.shape[0], -1)
        state["step"] = state.get("step", 0) + 1
        for side, product in (("left", matrix @ matrix.t()), ("right", matrix.t() @ matrix)):
            state.setdefault(side, torch.zeros_like(product)).add_(product)
        if state["step"] > group.get("start", 2):
            matrix = _root(state["left"]) @ matrix @ _root(state["right"])
        return matrix.view_as(gradient)


def _root(matrix: Tensor) -> Tensor:
    """The matrix to the power of -1/4, with small eigenvalues left out of it."""
    values, vectors = torch.linalg.eigh(matrix.double() + 1e-3 * torch.eye(len(matrix), dtype=torch.float64))
    return ((vectors * values.clamp(min=1e-6) ** -0.25) @ vectors.t()).to(matrix.dtype)


class Soap(PlainOptimizer):
    """By tensor: Adam in the eigenbasis of Shampoo's two matrices (https://arxiv.org/abs/2409.11321)."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        matrix = gradient.reshape(gradient.shape[0], -1)
        bases = []
        for side, product in (("left", matrix @ matrix.t()), ("right", matrix.t() @ matrix)):
            summed = state.setdefault(side, torch.zeros_like(product)).mul_(0.95).add_(product, alpha=0.05)
            bases.append(torch.linalg.eigh(summed.double())[1].to(matrix.dtype))
        rotated = bases[0].t() @ matrix @ bases[1]
        first = state.setdefault("momentum", torch.zeros_like(matrix)).lerp_(matrix, 0.1)
        second = state.setdefault("exp_avg_sq", torch.zeros_like(matrix)).lerp_(rotated.square(), 0.05)
        update = bases[0].t() @ first @ bases[1] / (second.sqrt() + 1e-4)
        return (bases[0] @ update @ bases[1].t()).view_as(gradient)


class EightBitAdam(PlainOptimizer):
    """By block: Adam whose momentum is kept in 8 bits, with one scale for each 256 elements in memory."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        update = adam(gradient, state)
        state["exp_avg"] = _rounded(state["exp_avg"])
        return update


def _rounded(values: Tensor, block: int = 256) -> Tensor:
    padded = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
    scale = padded.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return ((padded / scale).round() * scale).flatten()[: values.numel()].view_as(values)


class GlobalNormSgd(PlainOptimizer):
    """Over everything: gradients by the norm of all of them."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        norms = [one.grad.norm() for one in group["params"] if one.grad is not None]
        return gradient / torch.stack(norms).norm()


class NoisySgd(PlainOptimizer):
    """Over everything: with random noise."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient + torch.randn_like(gradient)


class Opaque(PlainOptimizer):
    """Elementwise, but cannot be copied: it holds a generator."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.rates: Iterator[float] = (1.0 for _ in iter(int, 1))

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient * next(self.rates)


def exact_orthogonalisation(gradient: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """Newton-Schulz as in `torch.optim.Muon`, in float64: bfloat16 magnifies last digits."""
    a, b, c = coefficients
    matrix = gradient.double()
    transposed = matrix.size(0) > matrix.size(1)
    matrix = matrix.t() if transposed else matrix
    matrix = matrix / math.sqrt(matrix.square().sum().item())
    for _ in range(steps):
        gram = matrix @ matrix.t()
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return (matrix.t() if transposed else matrix).to(gradient.dtype)
