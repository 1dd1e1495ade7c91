"""Which weights a layer's intermediate results depend on, index by index: from this all layouts follow.

Asked of a small model in float64 by gradients. An input feature of a linear layer depends on an output feature of
another exactly where the gradient is not zero; of modules that use their weights otherwise (fused experts), two indices
belong together where the second derivative of the module's output is not zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autotp_plan.probes.linear import is_linear
from autotp_plan.probes.norms import MEANS

Axis = tuple[str, int]
"""A parameter (or an input, as `module:argument`) and one of its dimensions."""
Masks = dict[Axis, list[int]]
"""For each index of an axis, the bit mask of the features that depend on it."""


@dataclass(kw_only=True, slots=True)
class Call:
    """A call of a module: its arguments, and what it returned."""

    bound: inspect.BoundArguments
    output: Any = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return self.bound.arguments


@dataclass(kw_only=True, slots=True)
class Watch:
    """What was seen in one forward pass of a model.

    Attributes:
        inputs: of linear layers, in the order in which they ran.
        outputs: zeros that were added to the output of a linear layer, by its name.
        calls: of all other modules; of one that ran several times the first.
        means: the means that norms took, by module.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    means: dict[str, list[Tensor]] = field(default_factory=dict)


def watch(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    norms: Sequence[str] = (),
    apart: bool = False,
    leaves: Mapping[str, Sequence[str]] | None = None,
) -> Watch:
    """Run a model and keep what is needed to ask what depends on what.

    Args:
        model: in float64.
        run: a forward pass of it.
        norms: modules whose means count as constants, so that a norm over a width joins nothing.
        apart: let no gradient through the inputs of linear layers: what is left are direct dependences.
        leaves: for modules, arguments that are watched as parameters are.
    """
    seen = Watch()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module):
                stack.enter_context(_hook(module, _linear_input(seen, name, apart)))
                stack.callback(module.register_forward_hook(_plus_zero(seen, name)).remove)
            elif name:
                stack.enter_context(_hook(module, _call(seen, name, (leaves or {}).get(name, ()))))
                stack.callback(module.register_forward_hook(_output(seen, name)).remove)
        for name in norms:
            stack.enter_context(constant_means(model.get_submodule(name), seen.means.setdefault(name, [])))
        stack.enter_context(Smooth())
        run()
    return seen


def masks(target: Tensor, sources: Mapping[str, Tensor]) -> Masks:
    """On which indices of `sources` each feature of `target`'s last dimension depends.

    Args:
        target: of shape (..., features), with a graph.
        sources: leaves of the graph, by name.

    Returns:
        Of every source that any feature depends on, every dimension.
    """
    weights = _random(target.shape[:-1])
    return _gathered((target * weights.unsqueeze(-1)).flatten(0, -2).sum(0), sources)


def reached(target: Tensor, sources: Mapping[str, Tensor]) -> set[str]:
    """The names of the sources on which `target` depends at all."""
    gradients = torch.autograd.grad(target.sum(), [*sources.values()], retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(sources, gradients) if gradient is not None and bool(gradient.any())}


def interactions(call: Call, parameters: Mapping[str, Tensor], name: str, dim: int) -> Masks:
    """Which indices of a module's parameters act together with each index of one dimension of one of them.

    Args:
        call: of the module.
        parameters: of the module.
        name: one of them.
        dim: its dimension, whose indices are the features.
    """
    output = first_tensor(call.output)
    assert output is not None
    total = (output * _random(output.shape)).sum()
    (gradient,) = torch.autograd.grad(total, [parameters[name]], create_graph=True, allow_unused=True)
    if gradient is None:
        return {}
    weighted = gradient * _random(gradient.shape)
    features = weighted.movedim(dim, 0).flatten(1).sum(1) if weighted.dim() > 1 else weighted
    return _gathered(features, parameters)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of floating point of a module's output."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, (tuple, list)):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


class Smooth(TorchFunctionMode):
    """While active, a ReLU has a gradient everywhere, and nothing is rounded to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS:
            return F.silu(args[0])
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        given = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **given)


_RELUS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_}


class ConstantMeans(TorchFunctionMode):
    """While active, means are constants; those found are kept, or given ones are taken in their place."""

    def __init__(self, found: list[Tensor], given: Iterator[Tensor] | None = None) -> None:
        super().__init__()
        self.found, self.given = found, given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in MEANS:
            return result
        if self.given is not None:
            return next(self.given)
        self.found.append(result.detach())
        return result.detach()


def _gathered(features: Tensor, sources: Mapping[str, Tensor]) -> Masks:
    """The masks of a vector of features."""
    names = [name for name, tensor in sources.items() if tensor.requires_grad]
    tensors = [sources[name] for name in names]
    found: dict[Axis, Tensor] = {}
    if not features.requires_grad or not tensors:
        return {}
    for start in range(0, len(features), CHUNK):
        stop = min(start + CHUNK, len(features))
        gradients = _gradients(features, tensors, start, stop)
        reached = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
        if not reached:
            continue
        largest = torch.stack([gradient.abs().flatten(1).max(1).values for gradient in reached]).max(0).values
        for name, gradient in zip(names, gradients):
            if gradient is None:
                continue
            touched = gradient.abs() > NOISE * largest.reshape(-1, *[1] * (gradient.dim() - 1))
            for dim in range(1, gradient.dim()):
                others = [other for other in range(1, gradient.dim()) if other != dim]
                rows = touched.any(dim=others) if others else touched
                every = torch.zeros(len(features), rows.shape[1], dtype=torch.bool)
                found.setdefault((name, dim - 1), every)[start:stop] = rows
    return {axis: _bits(rows) for axis, rows in found.items() if rows.any()}


def _bits(rows: Tensor) -> list[int]:
    """A column of a (features, indices) matrix of booleans as an integer."""
    packed = numpy.packbits(rows.numpy(), axis=0, bitorder="little")
    return [int.from_bytes(packed[:, index].tobytes(), "little") for index in range(packed.shape[1])]


CHUNK = 32
"""So many features are asked for at once."""
NOISE = 1e-12
"""A gradient that is smaller than this, measured by the largest, is rounding."""


def _gradients(features: Tensor, tensors: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor | None]:
    """The gradients of features `start` to `stop`, each a row."""
    chosen = torch.eye(len(features), dtype=features.dtype)[start:stop]
    try:
        return torch.autograd.grad(
            features, tensors, chosen, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation whose backward pass cannot be batched
        rows = [torch.autograd.grad(features, tensors, one, retain_graph=True, allow_unused=True) for one in chosen]
        return [None if each[0] is None else torch.stack(each) for each in zip(*rows)]


def _random(shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5


@contextmanager
def _hook(module: nn.Module, before: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _linear_input(seen: Watch, name: str, apart: bool) -> Callable[..., Any]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        seen.inputs.setdefault(name, given)
        if not apart:
            return None
        return ((given.detach(), *args[1:]), kwargs) if args else None

    return before


def _plus_zero(seen: Watch, name: str) -> Callable[..., Any]:
    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        zero = seen.outputs.setdefault(name, torch.zeros_like(output, requires_grad=True))
        return output + zero if zero.shape == output.shape else output

    return after


def _call(seen: Watch, name: str, leaves: Sequence[str]) -> Callable[..., Any]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if name in seen.calls:
            return None
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError:
            return None
        for leaf in leaves:
            value = bound.arguments.get(leaf)
            if isinstance(value, Tensor) and value.is_floating_point():
                bound.arguments[leaf] = value.detach().clone().requires_grad_()
        seen.calls[name] = Call(bound=bound)
        return (bound.args, bound.kwargs) if leaves else None

    return before


def _output(seen: Watch, name: str) -> Callable[..., Any]:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        call = seen.calls.get(name)
        if call is not None and call.output is None:
            call.output = output

    return after


@contextmanager
def constant_means(module: nn.Module, found: list[Tensor], given: Iterator[Tensor] | None = None) -> Iterator[None]:
    """While active, means in `module` are constants: kept in `found`, or taken from `given`."""
    forward = module.forward

    def constant(*args: Any, **kwargs: Any) -> Any:
        with ConstantMeans(found, given):
            return forward(*args, **kwargs)

    module.forward = constant
    try:
        yield
    finally:
        del module.forward
