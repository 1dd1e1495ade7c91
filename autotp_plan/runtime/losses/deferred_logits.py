"""Logits that are not computed: the hidden states that they come from, and what happened to them since.

A model's code may scale its logits by numbers, cap them or convert them; that is remembered. What is computed of them
afterwards (`TokenValues`, `Divergences`) does the same to a chunk at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from autotp_plan.runtime.deepspeed.internals import are_all_of_deepspeed
from autotp_plan.runtime.losses.word_chunks import WordChunks
from autotp_plan.runtime.tensor_parallel.gathered_weight import state_of
from autotp_plan.runtime.tensor_parallel.lazy_logits import LastDimSharding, LazilyGathered, is_elementwise
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear
from autotp_plan.runtime.tensor_parallel.torch_internals import (
    map_tensors,
    tensor_functions,
    version_of,
    without_torch_function,
)
from autotp_plan.schemas.errors import Fault, MismatchError


def sharding_of(head: ColumnParallelLinear) -> LastDimSharding:
    """Which words each rank has of a head's logits."""
    intervals = head.shards.layouts["weight"].intervals
    if not head.is_tp_parallel:
        return LastDimSharding(None, (((0, head.out_features),),), 0)
    return LastDimSharding(head.mp_group, intervals, head.tp_index)


@dataclass(slots=True)
class Forward:
    """A forward of a model, and whether it still runs."""

    model: str
    running: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Origin:
    """Where deferred logits come from.

    Attributes:
        head: the layer that computes them.
        chunks: how they are computed from its input.
        dtype: theirs.
        forward: that of the model.
        weights: `weights_now(head)` in the forward.
        is_detached: whether they were detached; then they have a gradient only where their hidden states do.
        hooks: those that DeepSpeed's engine registered, for what is computed of the logits after that.
    """

    head: ColumnParallelLinear
    chunks: WordChunks
    dtype: torch.dtype
    forward: Forward
    weights: object
    is_detached: bool = False
    hooks: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=OrderedDict)

    def check_weights(self) -> None:
        """Raise MismatchError where the logits would be of other weights than those of the forward."""
        if self.weights != weights_now(self.head):
            raise MismatchError(_weights_changed(self.forward.model))


def weights_now(head: ColumnParallelLinear) -> object:
    """What is another after a step or an assignment has changed the head."""
    return [state_of(one) if one.requires_grad else version_of(one) for one in head.parameters()]


class DeferredLogits(LazilyGathered):
    """The hidden states of logits; they look and behave like the logits, which are computed where they are needed.

    That needs every rank of the TP group. While the model's forward runs it is refused: its loss would not be computed
    in chunks then.
    """

    origin: Origin
    _hidden: Tensor | None
    """A tensor without data, which is of a subclass and cannot be of this one."""

    @classmethod
    def of_hidden(cls, hidden: Tensor, origin: Origin) -> DeferredLogits:
        """The logits that the head of `origin` computes from `hidden`, `(..., in_features)`."""
        is_plain = type(hidden) is Tensor
        made = (hidden if is_plain else _NO_DATA).as_subclass(cls)
        made._hidden = None if is_plain else hidden
        made.origin, made.sharding, made._full = origin, origin.chunks.sharding, None
        return made

    @property
    def shard(self) -> None:
        """None: no rank has computed its part."""

    @property
    def is_computed(self) -> bool:
        """Whether someone has used them as a tensor: from then on they are one."""
        return self._full is not None

    @property
    def hidden(self) -> Tensor:
        """The input of the head, an ordinary tensor `(..., in_features)`."""
        if self._hidden is not None:
            return self._hidden
        with without_torch_function():
            return self.as_subclass(Tensor)

    @property
    def needs_gradient(self) -> bool:
        """Whether the logits would need one."""
        if self.hidden.requires_grad:
            return True
        of_head = (one.requires_grad for one in self.origin.head.parameters())
        return not self.origin.is_detached and any(of_head)

    def compute(self, function: Callable[..., Tensor]) -> Tensor:
        """`function(chunks, hidden, weight, bias)` with hidden `(tokens, in_features)`, in a call of the head."""

        def of_tokens(input: Tensor, *weights: Tensor | None) -> Tensor:
            return function(self.origin.chunks, input.flatten(0, -2), *self.with_gradient(weights))

        self.origin.check_weights()
        return self._with_hooks(self.origin.head(self.hidden, compute=of_tokens))

    def with_gradient(self, weights: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The weights of the head, detached where these logits are."""
        if self.needs_gradient:
            return weights
        return [None if one is None else one.detach() for one in weights]

    def gathered(self) -> Tensor:
        """The full logits; the first call computes them, and is a collective."""
        if self._full is not None:
            return self._full
        if self.origin.forward.running:
            raise MismatchError(_used_in_forward(self.origin.forward.model, "a function that needs all logits"))
        self.origin.check_weights()
        with torch.set_grad_enabled(self.needs_gradient):  # whoever asks first may not need one, and others may
            full = self.origin.head(self.hidden)
            for step in self.origin.chunks.steps:
                full = step(full)
        full = self._with_hooks(full)
        if not torch.is_inference_mode_enabled():
            self._full = full
        return full

    def _with_hooks(self, computed: Tensor) -> Tensor:
        for hook in self.origin.hooks.values() if computed.requires_grad else ():
            computed.register_hook(hook)  # type: ignore[no-untyped-call]
        return computed

    def _hook_later(self, hook: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """The engine registers a hook on each output: the logits are not computed for it."""
        handle = RemovableHandle(self.origin.hooks)
        self.origin.hooks[handle.id] = hook
        return handle

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self._full) if self._full is not None else f"{type(self).__name__}(shape={list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if not isinstance(first, cls) or first._full is not None:
            args, kwargs = map_tensors(cls, cls.gathered, (args, kwargs))
            return func(*args, **kwargs)
        if func in _ABOUT_LOGITS:
            return func(first._outline(), *args[1:], **kwargs)
        if func in _HOOK and are_all_of_deepspeed(args[1:]):
            return first._hook_later(args[1])
        if func in _REQUIRES_GRAD:
            return first.needs_gradient
        if func in _ABOUT_HIDDEN:
            return func(first.hidden, *args[1:], **kwargs)
        if func in _OF_HIDDEN or (func in _INDEX and _is_of_tokens(first.dim(), *args[1:])):
            return first._of_tokens(func, args[1:], kwargs)
        if is_elementwise(func, (args[1:], kwargs)):
            return first._after(func, args[1:], kwargs)
        if first.origin.forward.running:
            raise MismatchError(_used_in_forward(first.origin.forward.model, str(getattr(func, "__name__", func))))
        args, kwargs = map_tensors(cls, cls.gathered, (args, kwargs))
        return func(*args, **kwargs)

    def _of_tokens(self, func: Any, others: Any, kwargs: Any) -> DeferredLogits:
        origin = replace(self.origin, is_detached=True) if func in _DETACH else self.origin
        return self.of_hidden(func(self.hidden, *others, **kwargs), origin)

    def _after(self, func: Any, others: Any, options: Any) -> DeferredLogits:
        def step(logits: Tensor) -> Tensor:
            result: Tensor = func(logits, *others, **options)
            return result

        origin = self.origin
        dtype = step(torch.empty(0, dtype=origin.dtype)).dtype
        chunks = replace(origin.chunks, steps=(*origin.chunks.steps, step))
        return self.of_hidden(self.hidden, replace(origin, chunks=chunks, dtype=dtype))

    def _outline(self) -> Tensor:
        shape = (*self.hidden.shape[:-1], self.sharding.size)
        return torch.empty(shape, dtype=self.origin.dtype, device="meta")


def _is_of_tokens(dim: int, index: Any) -> bool:
    """Whether an index chooses tokens alone, of a tensor of `dim` dimensions whose last one is the vocabulary."""
    found = list(index) if isinstance(index, tuple) else [index]
    if not all(one is Ellipsis or isinstance(one, (int, slice, Tensor)) for one in found):
        return False
    used = [one.dim() if isinstance(one, Tensor) and one.dtype == torch.bool else 1 for one in found]
    if Ellipsis not in [one for one in found if not isinstance(one, Tensor)]:
        return sum(used) < dim or (sum(used) == dim and _is_everything(found[-1]))
    return _is_everything(found[-1]) or (found[-1] is Ellipsis and sum(used) - 1 < dim)


def _is_everything(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _used_in_forward(model: str, function: str) -> Fault:
    return Fault(
        code="logits-used-in-forward",
        what="the model computes with its logits before its loss, in a way that is not known to be right in chunks",
        where=f"{model}.forward",
        got=f"a call of {function} on the logits",
        expected="numbers that scale or cap each logit, another dtype, or a choice of tokens",
        next="load_model without loss_chunks",
    )


def _weights_changed(model: str) -> Fault:
    return Fault(
        code="logits-of-other-weights",
        what="logits that were not computed yet are used after the head's weights have changed",
        where=f"output.logits of {model}",
        got="a use after an optimizer step, or another change of the weights",
        expected="a use before it, with the weights of the forward",
        next="compute what you need of the logits before the step, or load_model without loss_chunks",
    )


_NO_DATA = torch.empty(0)
_DETACH = tensor_functions("detach")
_OF_HIDDEN = tensor_functions("detach", "clone", "contiguous")
_INDEX = {Tensor.__getitem__}
_HOOK = {Tensor.register_hook}
_REQUIRES_GRAD = tensor_functions("requires_grad")
_ABOUT_LOGITS = tensor_functions(
    "shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "stride", "is_contiguous", "dtype",
    "is_floating_point", "is_complex", "element_size",
)  # fmt: skip
_ABOUT_HIDDEN = tensor_functions(
    "device", "layout", "is_leaf", "grad_fn", "output_nr", "is_cuda", "is_cpu", "is_meta", "is_xpu", "get_device",
)  # fmt: skip
