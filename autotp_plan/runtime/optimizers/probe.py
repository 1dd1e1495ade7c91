"""What an optimizer looks at, found out by letting a copy of it step small tensors. No communication; milliseconds.

The copy has the user's class, attributes and hyperparameters, and its own tensors and state. It steps a tensor, and
two parts of the same tensor: where the results are equal, the optimizer is elementwise, and a shard is enough for it.
Where they are not, it steps two tensors at once, and after each other: where these are equal, it looks at one tensor at
a time, and is right when it is given the full one. The first tensors are small, as a preconditioner of a large one
takes long. What is elementwise on them is tried on tensors larger than the blocks of 8-bit states, of which the parts
begin inside a block.
"""

from __future__ import annotations

import copy
import enum
import math
import types
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


_SHAPES = {1: ((48,), (12288,)), 2: ((8, 12), (96, 128)), 3: ((3, 6, 8), (3, 64, 64))}
"""By number of dimensions: the shapes of a small and of a large tensor."""
_STEPS = 3
_LR = 1e-2
_DEEPSPEED_ELEMENTWISE = ("deepspeed.ops.adam.", "deepspeed.ops.adagrad.", "deepspeed.ops.lion.")


def probe(optimizer: Any, group: int, ndim: int, device: torch.device) -> Finding:
    """What `optimizer` looks at when it steps a parameter.

    Args:
        optimizer: the user's optimizer, which is not changed.
        group: the number of the parameter group whose hyperparameters are used.
        ndim: number of dimensions of the parameter.
        device: where to compute: where its parameters are.
    """
    kind = type(optimizer)
    if kind.__module__.startswith(_DEEPSPEED_ELEMENTWISE):
        return Finding(LooksAt.ELEMENT)
    if hasattr(kind, "__del__"):
        return Finding(LooksAt.UNKNOWN, f"{kind.__name__} frees what it holds when it is deleted, and is not copied")
    devices = [device] if device.type == "cuda" else []
    shapes = _SHAPES.get(ndim) or ((2,) * (ndim - 2) + (6, 8), (2,) * (ndim - 2) + (64, 64))
    try:
        with torch.random.fork_rng(devices), NoCommunication():  # type: ignore[no-untyped-call]
            torch.manual_seed(0)
            for shape in shapes:
                finding = _probe(optimizer, group, shape, device)
                if finding.looks_at is not LooksAt.ELEMENT:
                    break
            return finding
    except Communicates:
        return Finding(LooksAt.ALL)
    except Exception as error:  # whatever a user's optimizer raises
        return Finding(LooksAt.UNKNOWN, f"{type(error).__name__}: {error}")


def _probe(optimizer: Any, group: int, shape: tuple[int, ...], device: torch.device) -> Finding:
    values, *gradients = (_numbers(shape, device) for _ in range(1 + _STEPS))
    others, *other_gradients = (_numbers(shape, device) for _ in range(1 + _STEPS))
    whole, shapes = _stepped(optimizer, group, [values], [gradients])
    is_elementwise = shapes <= {(), (1,), tuple(shape)}
    for dim in range(len(shape)) if is_elementwise else ():
        index = shape[dim] * 2 // 5
        ranges = ((0, index), (index, shape[dim] - index))
        found = [
            _stepped(optimizer, group, [values.narrow(dim, *one)], [[each.narrow(dim, *one) for each in gradients]])[0]
            for one in ranges
        ]
        is_elementwise = is_elementwise and _equal(whole[0], torch.cat([one[0] for one in found], dim), values)
    if is_elementwise:
        return Finding(LooksAt.ELEMENT)
    both = ([values, others], [gradients, other_gradients])
    at_once, _ = _stepped(optimizer, group, *both)
    one_by_one, _ = _stepped(optimizer, group, *both, one_by_one=True)
    separate = all(_equal(first, second, values) for first, second in zip(at_once, one_by_one))
    return Finding(LooksAt.TENSOR if separate else LooksAt.ALL)


def _numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of very different sizes, as gradients are."""
    scale = 10 ** (2 * torch.rand(shape) - 2) * 10 ** (torch.rand(*shape[:-1], 1))
    return (torch.randn(shape) * scale * 0.1).to(device)


def _stepped(
    optimizer: Any, group: int, values: list[Tensor], gradients: list[list[Tensor]], one_by_one: bool = False
) -> tuple[list[Tensor], set[tuple[int, ...]]]:
    """The values after the steps, and the shapes of what the state of the first holds."""
    parameters = [nn.Parameter(value.clone(memory_format=torch.contiguous_format)) for value in values]
    copied = _copy_for(optimizer, group, parameters)
    for step in range(_STEPS):
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient[step].clone(memory_format=torch.contiguous_format)
        if one_by_one:
            one_step = OneStep(copied, copied.step)
            for parameter in reversed(parameters):
                one_step.take([[parameter]])
            one_step.end()
        else:
            copied.step()
    state = copied.state.get(parameters[0], {})
    return [one.detach() for one in parameters], {tuple(shape) for shape in _shapes_in(state)}


def _shapes_in(state: Any) -> list[torch.Size]:
    """Shapes of the tensors in a state, and in the lists and dicts in it."""
    if isinstance(state, Tensor):
        return [state.shape]
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [shape for one in inside for shape in _shapes_in(one)]


def _copy_for(optimizer: Any, group: int, parameters: list[nn.Parameter]) -> Any:
    """A copy of `optimizer` with a group's hyperparameters that steps `parameters`, and that has taken no step yet."""
    hyperparameters = {key: value for key, value in optimizer.param_groups[group].items() if key != "params"}
    if isinstance(hyperparameters.get("lr"), (int, float)):
        hyperparameters["lr"] = _LR  # a warm-up begins with 0, with which nothing would be seen
    groups = [{**copy.deepcopy(hyperparameters), "params": list(parameters)}]
    memo: dict[int, Any] = {id(optimizer.param_groups): groups, id(optimizer.state): defaultdict(dict)}
    for of_user in optimizer.param_groups:
        memo[id(of_user)] = groups[0]
        memo |= {id(parameter): parameters[0] for parameter in of_user["params"]}
    copied = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    memo |= {id(value): value for value in vars(optimizer).values() if isinstance(value, types.ModuleType)}
    hooks = {name for name, value in vars(optimizer).items() if isinstance(value, OrderedDict)}
    for name, value in vars(optimizer).items():
        if name != "step":  # where it is the instance's: a wrapper of a scheduler, around the user's optimizer
            vars(copied)[name] = OrderedDict() if name in hooks else copy.deepcopy(value, memo)
    return copied


def _equal(first: Tensor, second: Tensor, before: Tensor) -> bool:
    """Whether two results of steps differ by no more than the rounding of float32."""
    step = (first - before).abs().max().item()
    error = (first - second).abs().max().item()
    return math.isfinite(step) and step > 0 and error <= 1e-4 * step + 2e-7 * before.abs().max().item()
