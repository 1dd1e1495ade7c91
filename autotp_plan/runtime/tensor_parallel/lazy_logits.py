"""Tensors whose all-gather is deferred to first use.

A model's code may do anything with its logits: scaling them by a number stays on each rank's shard, and whatever is not
known to act on each element by itself gets the full tensor. Nothing here knows what the tensors are for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.collectives import gather_last_dim
from autotp_plan.runtime.tensor_parallel.torch_internals import (
    holds_a_tensor,
    map_tensors,
    tensor_functions,
    without_torch_function,
)
from autotp_plan.schemas import intervals as iv


@dataclass(frozen=True, slots=True)
class LastDimSharding:
    """How the last dimension of a tensor is sharded.

    Attributes:
        group: the TP process group.
        intervals: the indices that each rank holds.
        tp_rank: this rank.
    """

    group: Any
    intervals: Sequence[iv.Intervals]
    tp_rank: int

    @property
    def held(self) -> iv.Intervals:
        """The indices that this rank holds."""
        return tuple(self.intervals[self.tp_rank])

    @property
    def size(self) -> int:
        """Length of the dimension on all ranks together."""
        return max(stop for rank in self.intervals for _, stop in rank)

    def gather(self, shard: Tensor) -> Tensor:
        """All-gather the tensor of which `shard` is this rank's; gradients flow back to the shard."""
        return gather_last_dim(shard, self.group, self.intervals, self.tp_rank)


class Deferred(Tensor):
    """A rank's shard of a tensor, or part of a sum, that looks and behaves like the full tensor.

    The first use that needs the full tensor makes it, by a collective: every rank of the group must make the same use.
    From then on it is the full tensor, so views of it and changes in place are those of an ordinary tensor.
    """

    _full: Tensor | None

    @property
    def shard(self) -> Tensor | None:
        """What this rank has, as an ordinary tensor; None once the full tensor is made."""
        if self._full is not None:
            return None
        with without_torch_function():
            return self.as_subclass(Tensor)

    def gathered(self) -> Tensor:
        """The full tensor; the first call is a collective."""
        if self._full is not None:
            return self._full
        with torch.enable_grad():  # whoever asks first may not need a gradient, and others may
            shard = self.shard
            assert shard is not None
            full = self._made_full(shard)
        if not torch.is_inference_mode_enabled():  # where no gradient can be kept
            self._full = full
        return full

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # one rank alone may show it to a person
        if self._full is not None:
            return repr(self._full)
        return f"{type(self).__name__}(shape={list(self.shape)}, of which this rank has {self._held_words()})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls) and first._full is None:
            if func in SHAPE:
                return func(first._outline(), *args[1:], **kwargs)
            if func in ABOUT or first._stays_deferred(func, (args[1:], kwargs)):
                with without_torch_function():
                    result = func(*args, **kwargs)
                if result is first or not isinstance(result, Tensor):
                    return result
                return first._of_same_kind(result)
        args, kwargs = map_tensors(cls, cls.gathered, (args, kwargs))
        return func(*args, **kwargs)

    def first_product(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """A column-parallel product that makes the full tensor on the way; None where there is no such way any more."""
        return None

    @abstractmethod
    def _made_full(self, shard: Tensor) -> Tensor:
        """The full tensor, by a collective."""

    @abstractmethod
    def _held_words(self) -> str:
        """What this rank has of it, in words."""

    @abstractmethod
    def _outline(self) -> Tensor:
        """A tensor of the full tensor's shape."""

    def _stays_deferred(self, func: Any, others: Any) -> bool:
        """Whether a function of what this rank has, with other arguments, gives what it has of the result."""
        return False

    @abstractmethod
    def _of_same_kind(self, shard: Tensor) -> Tensor:
        """The deferred tensor of which this rank has `shard`."""


class LazilyGathered(Deferred):
    """A rank's shard of a tensor that is sharded along its last dimension, all-gathered at its first use."""

    sharding: LastDimSharding

    @classmethod
    def of(cls, shard: Tensor, sharding: LastDimSharding) -> LazilyGathered:
        """The tensor of which `shard` is this rank's."""
        made = shard.as_subclass(cls)
        made.sharding, made._full = sharding, None
        return made

    def _made_full(self, shard: Tensor) -> Tensor:
        return self.sharding.gather(shard)

    def _held_words(self) -> str:
        return f"{iv.length(self.sharding.held)} of the last dimension"

    def _outline(self) -> Tensor:
        with without_torch_function():
            return torch.empty((*self.shape[:-1], self.sharding.size), dtype=self.dtype, device="meta")

    def _stays_deferred(self, func: Any, others: Any) -> bool:
        return is_elementwise(func, others)

    def _of_same_kind(self, shard: Tensor) -> Tensor:
        return type(self).of(shard, self.sharding)


SHAPE = tensor_functions("shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "stride", "is_contiguous")
"""Functions that ask for the shape of a tensor."""
ABOUT = tensor_functions(
    "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "output_nr", "retains_grad", "register_hook",
    "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_meta", "is_xpu", "get_device", "element_size",
)  # fmt: skip
"""Functions that ask for what a tensor is, and not for its shape or elements."""
_ELEMENTWISE = tensor_functions(
    "mul", "div", "add", "sub", "true_divide", "neg", "tanh", "float", "double", "half", "bfloat16", "to", "clone",
    "contiguous", "detach",
)  # fmt: skip


def is_elementwise(func: Any, others: Any) -> bool:
    """Whether a function acts on each element of its first argument by itself, with numbers as its other arguments."""
    return func in _ELEMENTWISE and _are_numbers(others)


def _are_numbers(others: Any) -> bool:
    """Whether an elementwise function has no other tensor to work on, which might need a gradient or be sharded."""
    return not holds_a_tensor(others)
