"""Optimizers that hide what they look at: by size, by step number, by gradient, by flags, in objects, in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.optimizers import EightBitAdam, PlainOptimizer, adam


class FactoredAbove(PlainOptimizer):
    """By tensor, where both dimensions are 128 or more: there second moments are kept by row and column."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if gradient.dim() < 2 or min(gradient.shape[-2:]) < 128:
            return adam(gradient, state)
        rows = state.setdefault("rows", torch.zeros_like(gradient[..., :1]))
        rows.lerp_(gradient.square().mean(-1, keepdim=True), 0.01)
        return gradient / (rows.sqrt() + 1e-8)


class QuantisedAbove(EightBitAdam):
    """By block, where a tensor has 4096 elements or more and consists of such blocks (as torchao's)."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        is_quantised = gradient.numel() >= 4096 and gradient.numel() % 256 == 0
        return super().update(gradient, parameter, state, group) if is_quantised else adam(gradient, state)


class RmsClipped(PlainOptimizer):
    """By tensor: an update whose root mean square is above 5 is scaled down, which only spikes are."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / max(1.0, gradient.square().mean().sqrt().item() / 5)


class StochasticRounding(PlainOptimizer):
    """Elementwise in float32; over everything in bfloat16, where values are rounded by random numbers."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        is_half = parameter.dtype == torch.bfloat16
        return gradient + 1e-3 * parameter * torch.rand_like(parameter) if is_half else gradient


class ScaledSign(PlainOptimizer):
    """By tensor: the sign of the gradient, times its mean size."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient.sign() * gradient.abs().mean()


class NormedLater(PlainOptimizer):
    """By tensor: after a warm-up that it counts in its state, in its group or in itself, gradients of norm 1."""

    counts_in: str = "state"
    steps: int = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        super().step()

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["steps"] = state.get("steps", 0) + 1
        steps = {"state": state, "group": group, "self": vars(self)}[self.counts_in]["steps"]
        return gradient / gradient.norm() if steps > 2000 else gradient


class NormedEveryTenth(PlainOptimizer):
    """By tensor: every tenth step has norm 1. Counts in a tensor."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        step = state.setdefault("step", torch.tensor(0.0)).add_(1)
        return gradient / gradient.norm() if step % 10 == 0 else gradient


class Distance(PlainOptimizer):
    """Over everything: a learning rate found from all gradients (as Prodigy's), which is very small at first."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            total = sum(one.grad.norm().item() for one in group["params"] if one.grad is not None)
            group["distance"] = max(group.get("distance", 1e-9), 1e-9 * total)
        super().step()

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient * group["distance"]


class Delayed(PlainOptimizer):
    """Elementwise, with no step at all at first."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        return gradient if state["step"] > 8 else torch.zeros_like(gradient)


class Projected(PlainOptimizer):
    """By tensor: where gradient and weight are orthogonal (as in SGDP), momentum along the weight is left out."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        cosine = (gradient * parameter).sum() / gradient.norm() / parameter.norm()
        momentum = state.setdefault("momentum", 0.1 * torch.ones_like(gradient)).lerp_(gradient, 0.1)
        if cosine.abs() > 1e-3:
            return momentum
        return momentum - parameter * (momentum * parameter).sum() / parameter.square().sum()


class Statistics:
    """What an optimizer may keep a matrix in."""

    def __init__(self, rows: int) -> None:
        self.matrix = torch.zeros(rows, rows)


class ObjectState(PlainOptimizer):
    """By tensor: collects a preconditioner in an object, and has not used it yet."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        statistics = state.setdefault("statistics", Statistics(len(gradient)))
        matrix = gradient.reshape(len(gradient), -1)
        statistics.matrix = statistics.matrix + (matrix @ matrix.t()).to(statistics.matrix)
        return gradient


class ForeachNormed(PlainOptimizer):
    """By tensor: all norms in one call, as foreach implementations do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        gradients = [one.grad for one in parameters]
        with torch.no_grad():
            updates = torch._foreach_div(gradients, torch._foreach_norm(gradients))
            torch._foreach_add_(parameters, updates, alpha=-self.defaults["lr"])

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise AssertionError("not called")


class WeakDecay(PlainOptimizer):
    """Over everything: Adam with a small weight decay by the mean of all second moments (as AdamS)."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [one.grad for group in self.param_groups for one in group["params"] if one.grad is not None]
        self.decay = 1e-6 / (torch.cat([one.flatten() for one in gradients]).square().mean().sqrt().item() + 1e-8)
        super().step()

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return adam(gradient, state) + self.decay * parameter


class FlaggedByAttribute(PlainOptimizer):
    """By tensor for parameters that have `use_norm`, elementwise for others."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / gradient.norm() if getattr(parameter, "use_norm", False) else gradient


class FlaggedByState(PlainOptimizer):
    """By tensor for matrices, elementwise for others; its constructor writes that into the state (Moonlight's Muon)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one]["use_norm"] = one.dim() == 2

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / gradient.norm() if state["use_norm"] else gradient


class StateInConstructor(PlainOptimizer):
    """Elementwise: Adagrad whose constructor makes the state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one]["sum"] = torch.full_like(one, 0.1)

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / state["sum"].add_(gradient.square()).sqrt()


class NormedStateInConstructor(StateInConstructor):
    """By tensor: as `StateInConstructor`, by norm."""

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return super().update(gradient, parameter, state, group) / gradient.norm()


class CountInState(PlainOptimizer):
    """By tensor: its number of steps is in its state, of no parameter (as SPAM's)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.state["steps"] = 0  # type: ignore[index]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["steps"] += 1  # type: ignore[index]
        super().step()

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / gradient.norm() / self.state["steps"]  # type: ignore[index]


class NeedsClosure(PlainOptimizer):
    """Elementwise, by the loss."""

    def step(self, closure: Any) -> None:  # type: ignore[override]
        self.loss = float(closure())
        super().step()

    def update(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient * self.loss
