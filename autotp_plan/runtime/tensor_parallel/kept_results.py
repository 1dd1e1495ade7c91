"""Selective activation checkpointing: results that take long are kept, the rest is computed again in the backward.

Kept are the results of matrix products with weights and of tensor parallelism's collectives. A collective changes its
tensor in place: a mode that keeps what operators return (torch's `create_selective_checkpoint_contexts`) would leave
the tensor of the second forward as it is. So a sum over the ranks is kept here, and made in the memory of the product
that it adds up, where nothing else reads that.

A product that is changed in place afterwards, as DeepSpeed's linear layer of ZeRO 3 adds its bias, is computed again:
its version does not tell, because torch counts that of a product of three dimensions apart.

No gradient needs what is computed after the last tensor that autograd saves, such as the sum that only the residual is
added to: the second forward ends before. It is not kept, and computed again where someone has switched that off
(`torch.utils.checkpoint.set_checkpoint_early_stop`).
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import SAC_IGNORED_OPS

from autotp_plan.runtime.tensor_parallel.torch_internals import (
    OperatorMode,
    alias_of,
    base_of,
    changed_by,
    on_saving,
    storage_of,
    version_of,
)
from autotp_plan.schemas.errors import Fault, MismatchError

_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
    "aten::_scaled_grouped_mm",
)
_IN_BATCHES = ("aten::bmm", "aten::baddbmm")
"""Products of attention with itself, which are computed again, or of all experts with their weights."""
_VIEWS = ("aten::_unsafe_view", "aten::view", "aten::t", "aten::transpose")
_OTHER, _VIEW, _PRODUCT, _BATCHES = range(4)


def selective_checkpointing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a checkpointed layer keeps: results of matrix products and collectives, and nothing that is cheap.

    A context function for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...)`, and with it
    for transformers: `gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": selective_checkpointing}`.
    Attention between query, key and value, norms, activation functions, rotary embeddings, casts and dropout are
    computed again in the backward.

    Returns:
        Context managers for the first forward of a layer and for the second, in the backward.
    """
    layer = _Layer()
    return _FirstForward(layer), _SecondForward(layer)


def kept(compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`; in the second forward of a selectively checkpointed layer that of the first."""
    layer = _current.layer
    if layer is None:
        return compute()
    found = layer.next(_COLLECTIVE) if layer.is_again else None
    if found is not None:
        return found.detach()
    return compute() if layer.is_again else layer.keep(_COLLECTIVE, compute())


def kept_sum(add_up: Callable[[Tensor], None], input: Tensor, *, is_product: bool) -> Tensor:
    """A new tensor of the values of `input`, after `add_up` has changed them in place.

    Args:
        add_up: changes a contiguous tensor in place.
        input: what to add up.
        is_product: `input` was computed by a matrix product just now, and nothing else reads it. Where that product is
            kept, the sum is kept in its place.
    """
    layer = _current.layer
    if layer is not None and not layer.is_again and is_product and layer.ends_with_product and input.is_contiguous():
        output = input.detach()
        add_up(output)
        return layer.keep(_COLLECTIVE, output)
    return kept(lambda: _summed(add_up, input))


def _summed(add_up: Callable[[Tensor], None], input: Tensor) -> Tensor:
    output = input.clone(memory_format=torch.contiguous_format)
    add_up(output)
    return output


_COLLECTIVE = "collective"


class _Layer:
    """One forward of a checkpointed layer, and the results of its operators and collectives in their order."""

    def __init__(self) -> None:
        self.results: dict[Any, list[_Result]] = defaultdict(list)
        self.saved = 0
        """How many tensors autograd has saved for the backward."""
        self.is_again = self.ends_with_product = False
        self._position: dict[Any, int] = {}

    def count_saved(self) -> None:
        """Autograd saves a tensor."""
        self.saved += 1

    def begin_again(self) -> None:
        """The second forward begins."""
        self.is_again = True
        self._position = dict.fromkeys(self.results, 0)

    def keep(self, key: Any, result: Tensor) -> Tensor:
        """`result`, which `next(key)` returns in the second forward."""
        self.results[key].append(_Result(alias_of(result), self.saved))
        return result

    def skip(self, key: Any) -> None:
        """In place of `keep`: `next(key)` returns None."""
        self.results[key].append(_Result(None, self.saved))

    def forget_changed(self, tensors: list[Tensor]) -> None:
        """Compute products again whose memory is changed: `x = product(...); x += bias`."""
        changed = {storage_of(tensor) for tensor in tensors}
        for key, results in self.results.items():
            if key != _COLLECTIVE:
                for at, result in enumerate(results):
                    if result.shares(changed):
                        results[at] = _Result(None, result.saved_before)

    def forget_the_last(self) -> None:
        """Keep nothing that was computed after the last tensor that autograd has saved: no gradient needs it."""
        for results in self.results.values():
            for at in reversed(range(len(results))):
                if results[at].saved_before < self.saved:
                    break
                results[at] = _Result(None, self.saved)

    def next(self, key: Any) -> Tensor | None:
        """The next result of the first forward, which is kept no longer; None where it is to be computed again."""
        at = self._position.get(key, 0)
        self._position[key] = at + 1
        results = self.results.get(key, ())
        if at >= len(results):
            raise MismatchError(_fault("another product or collective"))
        return results[at].taken()


class _Result:
    """What is kept of an operator or collective, until it is used."""

    __slots__ = ("_is_used", "_tensor", "_version", "saved_before")

    def __init__(self, tensor: Tensor | None, saved_before: int) -> None:
        self._tensor, self._is_used, self.saved_before = tensor, False, saved_before
        self._version = None if tensor is None else version_of(tensor)

    def shares(self, storages: set[int]) -> bool:
        """Whether what is kept lies in one of these memories."""
        return self._tensor is not None and storage_of(self._tensor) in storages

    def taken(self) -> Tensor | None:
        """The tensor, once; None: there is none."""
        if self._is_used:
            raise MismatchError(_fault("a second backward of one loss"))
        tensor, self._tensor, self._is_used = self._tensor, None, self._tensor is not None
        if tensor is not None and version_of(tensor) != self._version:
            raise MismatchError(_fault("the result of a product or collective, changed in place since"))
        return tensor


class _Current(threading.local):
    layer: _Layer | None = None


_current = _Current()


class _Forward(OperatorMode):  # type: ignore[misc]
    """While active in a `with`, the layer of this thread is `layer`."""

    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.layer = layer
        self._outer: _Layer | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Functions that `torch.compile` has compiled run as they are: this is asked by torch."""
        return True

    def __enter__(self) -> Any:
        self._outer, _current.layer = _current.layer, self.layer
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _current.layer = self._outer
        super().__exit__(*error)


class _FirstForward(_Forward):
    _counting: AbstractContextManager[None] | None = None

    def __enter__(self) -> Any:
        self._counting = on_saving(self.layer.count_saved)
        self._counting.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        counting, self._counting = self._counting, None  # it knows what the layer is computed again from
        assert counting is not None
        counting.__exit__(*error)
        if self.layer.saved:
            self.layer.forget_the_last()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        kind = _kind(func)
        if kind == _VIEW:
            return result
        layer = self.layer
        changed = changed_by(func, args, kwargs)
        if changed and func.namespace != "c10d":  # a sum over the ranks is kept in the product's memory
            layer.forget_changed(changed)
        layer.ends_with_product = kind == _PRODUCT or (kind == _BATCHES and any(map(_is_weight, args)))
        if layer.ends_with_product:
            layer.keep(func, result)
        elif kind == _BATCHES:
            layer.skip(func)
        return result


class _SecondForward(_Forward):
    def __enter__(self) -> Any:
        self.layer.begin_again()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.layer.next(func) if _kind(func) >= _PRODUCT else None
        if found is not None:
            return found
        return func(*args, **kwargs) if kwargs else func(*args)


@functools.cache
def _kind(operator: Any) -> int:
    name = operator.name()  # of one that writes into a tensor that is given: aten::mm.out
    if name in _PRODUCTS:
        return _PRODUCT
    if name in _IN_BATCHES:
        return _BATCHES
    return _VIEW if name in _VIEWS or operator in SAC_IGNORED_OPS else _OTHER


def _is_weight(operand: Any) -> bool:
    return isinstance(operand, nn.Parameter) or (
        isinstance(operand, Tensor) and isinstance(base_of(operand), nn.Parameter)
    )


def _fault(got: str) -> Fault:
    return Fault(
        code="computed-again",
        what="a layer's second forward, in the backward, is not what its first was",
        where="selective activation checkpointing",
        got=got,
        expected="a layer that computes the same twice, and changes no result of a collective in place",
        next='activation_checkpointing="full" computes them again, too',
    )
