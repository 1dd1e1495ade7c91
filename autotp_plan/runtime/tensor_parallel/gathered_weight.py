"""The weight of a vocabulary-parallel layer as code outside of the layer reads it: the full weight, not a shard.

A fused loss (TRL, Liger, cut cross entropy) does not call the head: it reads `lm_head.weight` and multiplies by it.
With a shard it would take a softmax over part of the vocabulary. `layer.weight` is therefore a tensor of the full shape
that is all-gathered at its first use, and whose gradient flows to the shard. The parameter itself stays the shard:
optimizers and ZeRO find it by `named_parameters`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from autotp_plan.runtime.deepspeed.zero_internals import is_managed_by_zero3, is_partitioned
from autotp_plan.runtime.tensor_parallel.collectives import gather_shards, take
from autotp_plan.runtime.tensor_parallel.torch_internals import (
    map_tensors,
    tensor_functions,
    version_of,
    without_torch_function,
)
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.layout import Layout

_showing_shards: ContextVar[bool] = ContextVar("showing_shards", default=False)


@contextlib.contextmanager
def showing_shards() -> Iterator[None]:
    """While active, `layer.weight` is this rank's shard, for code that does the same to each shard as to the weight."""
    token = _showing_shards.set(True)
    try:
        yield
    finally:
        _showing_shards.reset(token)


def are_shards_shown() -> bool:
    """Whether `showing_shards` is active."""
    return _showing_shards.get()


@dataclass(frozen=True, slots=True, eq=False)
class ShardedWeight:
    """One rank's shard of a weight, and where it lies.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter that holds the shard.
        shard: returns the shard, with a gradient to the parameter.
        layout: which indices each rank holds.
        shape: the full shape.
        group: the TP process group.
        tp_rank: this rank.
    """

    name: str
    parameter: nn.Parameter
    shard: Callable[[], Tensor]
    layout: Layout
    shape: tuple[int, ...]
    group: Any
    tp_rank: int


class GatheredWeight(Tensor):
    """The full tensor of which each rank has a shard; it looks and computes like it.

    The first use of its numbers, and the first after an optimizer step, is a collective: every rank of the group must
    make the same use. Shape, dtype, device and `print` are none. It cannot be changed in place: no rank would keep it.
    """

    sharded: ShardedWeight
    with_gradient: bool
    _full: tuple[Tensor, object] | None

    @classmethod
    def of(cls, sharded: ShardedWeight, with_gradient: bool = True) -> GatheredWeight:
        """The full tensor of `sharded`; its gradient flows to the shard even where it is read under `no_grad`."""
        with torch.set_grad_enabled(with_gradient), _materialized(sharded.parameter):
            outline: Tensor = _Gather.apply(sharded.shard(), sharded, False)  # type: ignore[no-untyped-call]
        made = outline.as_subclass(cls)
        made.sharded, made.with_gradient, made._full = sharded, with_gradient, None
        return made

    def gathered(self) -> Tensor:
        """The full tensor as an ordinary one; a collective unless it is known already."""
        sharded, state = self.sharded, state_of(self.sharded.parameter)
        if self._full is not None and self._full[1] == state:
            return self._full[0]
        with torch.set_grad_enabled(self.with_gradient), _materialized(sharded.parameter):
            full: Tensor = _Gather.apply(sharded.shard(), sharded, True)  # type: ignore[no-untyped-call]
        if not torch.is_inference_mode_enabled():
            self._full = full, state
        return full

    def __getattr__(self, name: str) -> Any:
        """What others have set on the parameter, ZeRO for one."""
        if name in ("sharded", "with_gradient", "_full"):
            raise AttributeError(name)
        return getattr(self.sharded.parameter, name)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # one rank alone may show it to a person
        held = tuple(self.sharded.parameter.shape)
        return f"{type(self).__name__}({self.sharded.name}, shape={self.sharded.shape}, of which this rank has {held})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            if func in _OF_THE_OUTLINE:
                with without_torch_function():
                    return func(*args, **kwargs)
            if func in _OF_THE_PARAMETER:
                result = func(first.sharded.parameter, *args[1:], **kwargs)
                return first if result is first.sharded.parameter else result
            if func in _DETACHED:
                return cls.of(first.sharded, with_gradient=False)
            if func in _GRAD:
                return _gathered_gradient(first.sharded)
        _refuse_changes(cls, func, args, kwargs)
        args, kwargs = map_tensors(cls, cls.gathered, (args, kwargs))
        return func(*args, **kwargs)


class _Gather(torch.autograd.Function):
    """The full tensor, or one of its shape that holds a single NaN. What follows computes the same on every rank, so
    the shard's gradient is a part of the full gradient.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor, sharded: ShardedWeight, with_data: bool) -> Tensor:
        layout = sharded.layout
        assert layout.dim is not None
        ctx.sharded, ctx.shape = sharded, shard.shape
        if not with_data:
            return shard.new_full((), torch.nan if shard.is_floating_point() else 0).expand(sharded.shape)
        local = shard.detach().reshape(layout.rank_shape(sharded.tp_rank))
        return gather_shards(local, sharded.group, layout.intervals, layout.dim).reshape(sharded.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        layout = ctx.sharded.layout
        held = take(grad_output.reshape(layout.shape), layout.intervals[ctx.sharded.tp_rank], layout.dim)
        return held.reshape(ctx.shape), None, None


class _Steps:
    """Counts the steps of all optimizers: ZeRO changes a parameter's data without its version."""

    count = 0
    hook: Any = None

    @classmethod
    def add(cls, *_: Any) -> None:
        cls.count += 1


def state_of(parameter: nn.Parameter) -> object:
    """What is another after `parameter` was changed."""
    if _Steps.hook is None:
        _Steps.hook = register_optimizer_step_post_hook(_Steps.add)
    if is_managed_by_zero3(parameter):  # which moves it at every use, to other places on other ranks
        return _Steps.count
    return version_of(parameter), parameter.data_ptr(), _Steps.count


def _gathered_gradient(sharded: ShardedWeight) -> Tensor | None:
    """The gradient of the full tensor, None where there is none. A collective."""
    gradient, layout = sharded.parameter.grad, sharded.layout
    if gradient is None:
        return None
    assert layout.dim is not None
    local = gradient.reshape(layout.rank_shape(sharded.tp_rank))
    return gather_shards(local, sharded.group, layout.intervals, layout.dim).reshape(sharded.shape)


def _materialized(parameter: nn.Parameter) -> Any:
    """While active, ZeRO 3 has put together its partitions of `parameter`."""
    return GatheredParameters([parameter]) if is_partitioned(parameter) else contextlib.nullcontext()


def _refuse_changes(cls: type[Tensor], func: Any, args: Any, kwargs: Any) -> None:
    name = str(getattr(func, "__name__", ""))
    in_place = name in ("__set__", "__setitem__") or name.startswith("__i") or (name[-1:] == "_" and name[-2:] != "__")
    changed = next((one for one in (*args[:1], *kwargs.values()) if isinstance(one, cls)), None)
    if kwargs.get("out") is not None and not in_place:
        changed = next((one for one in _flat(kwargs["out"]) if isinstance(one, cls)), None)
        in_place = changed is not None
    if not in_place or not isinstance(changed, GatheredWeight):
        return
    where = changed.sharded.name
    raise MismatchError(
        Fault(
            what="a sharded weight cannot be changed through the attribute of its layer, which is a gathered copy",
            where=f"{where}: {name}",
            got=f"a change of the full weight, {list(changed.sharded.shape)}",
            expected=f"a change of this rank's shard, {list(changed.sharded.parameter.shape)}, or of the checkpoint",
            next=f"under torch.no_grad(), change the shard: model.get_parameter({where!r})",
        )
    )


def _flat(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


_GRAD = tensor_functions("grad")
_DETACHED = tensor_functions("data", "detach")
_OF_THE_OUTLINE = tensor_functions(
    "shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "dtype", "device", "layout", "is_leaf",
    "grad_fn", "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_meta", "is_xpu", "get_device",
    "element_size", "itemsize", "is_sparse", "is_quantized", "is_nested", "is_inference", "names", "__len__",
)  # fmt: skip
_OF_THE_PARAMETER = {
    *tensor_functions("requires_grad", "requires_grad_", "register_post_accumulate_grad_hook"),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
}
