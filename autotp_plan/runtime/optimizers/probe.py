"""What an optimizer looks at, found out by letting a copy of it step small tensors. No communication; milliseconds.

The copy steps a tensor, and two parts of the same tensor. Where the results are equal, and so is all that the copies
keep (states, and numbers that they count in), the optimizer is elementwise, and a shard is enough for it. Where they
are not, it steps two tensors at once, and after each other: where these are equal, it looks at one tensor at a time,
and is right when it is given the full one.

The first tensors are small, as a preconditioner of a large one takes long. What is elementwise on them is tried on
larger ones: above the sizes from which optimizers factor a matrix or keep 8-bit states. Gradients are ordinary, very
large, very small, and orthogonal to the weights, as optimizers clip and project. After some steps the numbers that
count steps are set to later ones, as optimizers warm up, and do some of their work every 10 or 200 steps.
"""

from __future__ import annotations

import enum
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.runtime.optimizers.optimizer_copy import Kept, copy_for, kept_by, set_counters, tolerance
from autotp_plan.runtime.optimizers.step_alone import OneStep
from autotp_plan.runtime.tensor_parallel.torch_internals import Communicates, NoCommunication


class LooksAt(enum.Enum):
    """What of a parameter an optimizer needs for one element of its step."""

    ELEMENT = "each element by itself"
    TENSOR = "a whole tensor"
    ALL = "several tensors at once, random numbers, or other processes"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and why it is unknown where it is."""

    looks_at: LooksAt
    reason: str = ""


_SHAPES = {1: ((48,), (12288,)), 2: ((8, 12), (264, 512)), 3: ((3, 6, 8), (2, 144, 256))}
"""By number of dimensions: the shapes of a small and of a large tensor. The latter can be divided into blocks of 2048
elements: some optimizers quantise the state of such tensors alone.
"""
_STEPS = 4
_LATE_STEPS = (99, 4095, 9999)
"""Numbers of steps before two more: multiples of 10, 64, 200, 500, ... follow, and every warm-up has ended."""
_DEEPSPEED_ELEMENTWISE = ("deepspeed.ops.adam.", "deepspeed.ops.adagrad.", "deepspeed.ops.lion.")


def probe(optimizer: Any, group: int, ndim: int, device: torch.device, like: Tensor | None = None) -> Finding:
    """What `optimizer` looks at when it steps a parameter.

    Args:
        optimizer: the user's optimizer, which is not changed.
        group: the number of the parameter group whose hyperparameters are used.
        ndim: number of dimensions of the parameter.
        device: where to compute: where its parameters are.
        like: the parameter; its attributes and dtype decide in some optimizers.
    """
    kind = type(optimizer)
    if kind.__module__.startswith(_DEEPSPEED_ELEMENTWISE):
        return Finding(LooksAt.ELEMENT)
    if hasattr(kind, "__del__"):
        return Finding(LooksAt.UNKNOWN, f"{kind.__name__} frees what it holds when it is deleted, and is not copied")
    small, large = _SHAPES.get(ndim) or ((2,) * (ndim - 2) + (6, 8), (2,) * (ndim - 2) + (144, 256))
    try:
        with _nothing_changes(device):
            return _probe(_Trial(optimizer, group, device, like), small, large)
    except Communicates:
        return Finding(LooksAt.ALL)
    except Exception as error:  # whatever a user's optimizer raises
        return Finding(LooksAt.UNKNOWN, f"{type(error).__name__}: {error}")


def _probe(trial: _Trial, small: tuple[int, ...], large: tuple[int, ...]) -> Finding:
    try:
        finding = trial.finding(small)
    except Communicates:
        raise
    except Exception:  # of kernels that are there for float32 only
        trial = replace(trial, dtype=torch.float32)
        finding = trial.finding(small)
    if finding.reason:
        trial = replace(trial, num_steps=6 * _STEPS)
        finding = trial.finding(small)
    if finding.looks_at is LooksAt.ELEMENT:
        finding = trial.finding(large)
    if finding.looks_at is LooksAt.ELEMENT:
        return replace(trial, late_steps=_LATE_STEPS).finding(small)
    if finding.looks_at is LooksAt.TENSOR:
        with suppress(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            late = replace(trial, late_steps=_LATE_STEPS).finding(small)
            finding = late if late.looks_at is LooksAt.ALL else finding
    return finding


@dataclass(frozen=True, slots=True)
class _Stepped:
    """Values after steps, and what the optimizer keeps of the first of them."""

    values: list[Tensor]
    kept: Kept
    drew_random_numbers: bool


@dataclass(frozen=True, slots=True)
class _Trial:
    optimizer: Any
    group: int
    device: torch.device
    like: Tensor | None
    dtype: torch.dtype = torch.float64
    num_steps: int = _STEPS
    late_steps: Sequence[int] = ()

    def finding(self, shape: tuple[int, ...]) -> Finding:
        """What the optimizer looks at in tensors of a shape."""
        number = self.num_steps + 2 * len(self.late_steps)
        values, others = (_numbers(shape, self.device, self.dtype) for _ in range(2))
        gradients, other_gradients = (_gradients(one, number) for one in (values, others))
        whole = self._stepped([values], [gradients])
        step = (whole.values[0] - values).abs().max().item()
        if whole.drew_random_numbers or (self._is_half() and self._draws_in_half(values, gradients)):
            return Finding(LooksAt.ALL)
        if not math.isfinite(step) or step == 0:
            return Finding(LooksAt.UNKNOWN, "its steps were not finite" if step else "it took no step")
        if step < 1e4 * _rounding(values):
            return Finding(LooksAt.UNKNOWN, "its steps were as small as rounding")
        if all(self._is_separable(whole, values, gradients, dim) for dim in range(len(shape))):
            return Finding(LooksAt.ELEMENT)
        both = ([values, others], [gradients, other_gradients])
        at_once, one_by_one = self._stepped(*both), self._stepped(*both, one_by_one=True)
        pairs = zip(at_once.values, one_by_one.values, (values, others), strict=True)
        is_alone = all(_equal(*pair) for pair in pairs) and at_once.kept.equals([one_by_one.kept])
        return Finding(LooksAt.TENSOR if is_alone else LooksAt.ALL)

    def _is_separable(self, whole: _Stepped, values: Tensor, gradients: list[Tensor], dim: int) -> bool:
        """Whether two parts of `values` take the same steps as all of it."""
        index = values.shape[dim] * 2 // 5
        ranges = ((0, index), (index, values.shape[dim] - index))
        parts = [
            self._stepped([values.narrow(dim, *one)], [[gradient.narrow(dim, *one) for gradient in gradients]])
            for one in ranges
        ]
        joined = torch.cat([one.values[0] for one in parts], dim)
        return _equal(whole.values[0], joined, values) and whole.kept.equals([one.kept for one in parts], dim)

    def _is_half(self) -> bool:
        return self.like is not None and self.like.dtype in (torch.float16, torch.bfloat16)

    def _draws_in_half(self, values: Tensor, gradients: list[Tensor]) -> bool:
        """Whether values of fewer bits are rounded by random numbers."""
        assert self.like is not None
        some = [one.to(self.like.dtype) for one in gradients]
        return self._stepped([values.to(self.like.dtype)], [some]).drew_random_numbers

    def _stepped(self, values: list[Tensor], gradients: list[list[Tensor]], one_by_one: bool = False) -> _Stepped:
        parameters = [nn.Parameter(value.clone(memory_format=torch.contiguous_format)) for value in values]
        copied = copy_for(self.optimizer, self.group, parameters, self.like)
        before = self._random_states()
        late = iter(self.late_steps)
        history: list[Kept] = []
        for at in range(len(gradients[0])):
            if at >= self.num_steps and (at - self.num_steps) % 2 == 0:
                set_counters(copied, history[-2:], next(late))
            for parameter, each in zip(parameters, gradients):
                parameter.grad = each[at].clone(memory_format=torch.contiguous_format)
            if one_by_one:
                one_step = OneStep(copied, copied.step)
                for parameter in reversed(parameters):
                    one_step.take([[parameter]])
                one_step.end()
            else:
                copied.step()
            history.append(kept_by(copied, parameters))
        return _Stepped([one.detach() for one in parameters], history[-1], before != self._random_states())

    def _random_states(self) -> Any:
        on_device = torch.cuda.get_rng_state(self.device).tolist() if self.device.type == "cuda" else None
        return torch.get_rng_state().tolist(), on_device, random.getstate()


@contextmanager
def _nothing_changes(device: torch.device) -> Iterator[None]:
    """While active, random states are ours, nothing is compiled, and communication raises."""
    state = random.getstate()
    devices = [device] if device.type == "cuda" else []
    compiles = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it takes seconds
    try:
        with (
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager") if compiles else nullcontext(),
            NoCommunication(),  # type: ignore[no-untyped-call]
        ):
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(state)


def _numbers(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, as gradients are."""
    scale = 10 ** (2 * torch.rand(shape) - 2) * 10 ** (torch.rand(*shape[:-1], 1))
    return (torch.randn(shape) * scale * 0.1).to(device, dtype)


def _gradients(values: Tensor, number: int) -> list[Tensor]:
    """Gradients of `values`: the first is orthogonal to each row of them, others are 100 times as large, or small."""
    found = []
    for at in range(number):
        gradient = _numbers(tuple(values.shape), values.device, values.dtype)
        if at == 0:
            along = (gradient * values).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True)
            gradient = gradient - along * values
        found.append(gradient * (1, 1, 100, 0.01)[at % 4])
    return found


def _equal(first: Tensor, second: Tensor, before: Tensor) -> bool:
    """Whether two results of steps differ by no more than the rounding of their dtype."""
    step = (first - before).abs().max().item()
    error = (first - second).abs().max().item()
    return math.isfinite(step) and error <= tolerance(before.dtype) * step + _rounding(before)


def _rounding(values: Tensor) -> float:
    return 2 * torch.finfo(values.dtype).eps * values.abs().max().item()
