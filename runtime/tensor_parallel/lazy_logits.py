"""Tensors that are put together from the ranks' parts only when someone looks at more than their own part.

So a model's own code may do what it likes with its logits: scaling them by a number stays on each rank, anything that
is not known to act on each element by itself sees the whole. Nothing here knows what the tensors are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from autotp_plan.runtime.tensor_parallel.collectives import gather_last_dim
from autotp_plan.schemas import intervals as iv


@dataclass(frozen=True, slots=True)
class Parts:
    """How the last dimension is cut: the TP process group, each rank's intervals, and which rank this is."""

    group: Any
    intervals: Sequence[iv.Intervals]
    tp_rank: int

    @property
    def held(self) -> iv.Intervals:
        """What this rank has."""
        return tuple(self.intervals[self.tp_rank])

    @property
    def size(self) -> int:
        """Length of the whole dimension."""
        return max(stop for rank in self.intervals for _, stop in rank)

    def gather(self, part: Tensor) -> Tensor:
        """The whole of which `part` is this rank's. A collective; gradients flow back to the part."""
        return gather_last_dim(part, self.group, self.intervals, self.tp_rank)


class GatheredWhenUsed(Tensor):
    """A rank's part of a tensor that is cut along its last dimension, which looks and behaves like the whole.

    The first use that needs the whole gathers it, a collective: every rank of the group must make the same use. From
    then on it is the whole, so views of it and changes in place are those of an ordinary tensor.
    """

    parts: Parts
    _whole: Tensor | None

    @classmethod
    def of(cls, part: Tensor, parts: Parts) -> GatheredWhenUsed:
        """The tensor of which `part` is this rank's."""
        made = part.as_subclass(cls)
        made.parts, made._whole = parts, None
        return made

    @property
    def part(self) -> Tensor | None:
        """This rank's part as an ordinary tensor, None once it is the whole."""
        if self._whole is not None:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def whole(self) -> Tensor:
        """The whole tensor, gathered the first time: a collective."""
        if self._whole is not None:
            return self._whole
        with torch.enable_grad():  # whoever asks first may not need a gradient, and others may
            part = self.part
            assert part is not None
            whole = self.parts.gather(part)
        if not torch.is_inference_mode_enabled():  # where no gradient can be kept
            self._whole = whole
        return whole

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # one rank alone may show it to a person
        if self._whole is not None:
            return repr(self._whole)
        held = iv.length(self.parts.held)
        return f"{type(self).__name__}(shape={list(self.shape)}, of which this rank has {held} of the last dimension)"

    def __format__(self, spec: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls) and first._whole is None:
            if func in _SHAPE:
                return func(first._outline(), *args[1:], **kwargs)
            if func in _OF_THE_PART or (func in _ELEMENTWISE and _are_numbers((args[1:], kwargs))):
                with torch._C.DisableTorchFunctionSubclass():
                    result = func(*args, **kwargs)
                if result is first or not isinstance(result, Tensor):
                    return result
                return cls.of(result, first.parts)
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs))
        return func(*args, **kwargs)

    def _outline(self) -> Tensor:
        """The whole's shape without its data."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty((*self.shape[:-1], self.parts.size), dtype=self.dtype, device="meta")


def _functions(*names: str) -> set[Any]:
    """The functions and attributes of tensors of these names, as `__torch_function__` is given them."""
    found: set[Any] = set()
    for name in names:
        of_tensors: Any = getattr(Tensor, name, None)
        found.add(of_tensors.__get__ if hasattr(type(of_tensors), "__set__") else of_tensors)
        found.add(getattr(torch, name, None))
    return found - {None}


_SHAPE = _functions("shape", "size", "numel", "nelement", "dim", "ndim", "ndimension", "stride", "is_contiguous")
_OF_THE_PART = _functions(
    "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "output_nr", "retains_grad", "register_hook",
    "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_meta", "is_xpu", "get_device", "element_size",
)  # fmt: skip
_ELEMENTWISE = _functions(
    "mul", "div", "add", "sub", "true_divide", "neg", "tanh", "float", "double", "half", "bfloat16", "to", "clone",
    "contiguous", "detach",
)  # fmt: skip


def _are_numbers(others: Any) -> bool:
    """Whether no tensor is among what an elementwise function is given besides: it might need a gradient or be cut."""
    return not any(isinstance(one, Tensor) for one in torch.utils._pytree.tree_leaves(others))
