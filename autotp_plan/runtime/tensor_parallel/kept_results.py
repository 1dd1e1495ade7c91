"""Selective activation checkpointing: results that take long are kept, the rest is computed again in the backward.

Kept are the results of matrix products with weights (by torch's policy for operators) and of tensor parallelism's
collectives. A collective changes its tensor in place: torch would keep what the operator returns, and leave the tensor
of the second forward as it is. So a sum over the ranks is kept here, and made in the memory of the product that it adds
up, where nothing else reads that.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from autotp_plan.runtime.tensor_parallel.torch_internals import base_of, version_of
from autotp_plan.schemas.errors import Fault, MismatchError

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm")
_IN_BATCHES = ("aten::bmm", "aten::baddbmm")
"""Products of attention with itself, which are computed again, or of all experts with their weights."""
_VIEWS = ("aten::_unsafe_view", "aten::view", "aten::t", "aten::transpose", "aten::detach")


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
    policy = functools.partial(_policy, layer)
    first, again = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return _Forward(layer, first, is_again=False), _Forward(layer, again, is_again=True)


def kept(compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`; in the second forward of a selectively checkpointed layer that of the first."""
    layer = _current.layer
    if layer is None:
        return compute()
    return layer.next() if layer.is_again else layer.keep(compute())


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
        return layer.keep(output)
    return kept(lambda: _summed(add_up, input))


def _summed(add_up: Callable[[Tensor], None], input: Tensor) -> Tensor:
    output = input.clone(memory_format=torch.contiguous_format)
    add_up(output)
    return output


class _Layer:
    """One forward of a checkpointed layer, and the results of its collectives in their order."""

    def __init__(self) -> None:
        self.results: list[tuple[Tensor, int] | None] = []
        """Each with its version; None: it has been used."""
        self.is_again = self.ends_with_product = False
        self._position = 0

    def begin(self, is_again: bool) -> None:
        self.is_again, self._position = is_again, 0

    def keep(self, result: Tensor) -> Tensor:
        self.results.append((result.detach(), version_of(result)))
        return result

    def next(self) -> Tensor:
        """The next result of the first forward, which is kept no longer."""
        at, self._position = self._position, self._position + 1
        found = self.results[at] if at < len(self.results) else None
        if found is None:
            raise MismatchError(_fault("another collective, or a second backward of one loss"))
        self.results[at] = None
        result, version = found
        if version_of(result) != version:
            raise MismatchError(_fault("the result of a collective, changed in place since"))
        return result.detach()


class _Current(threading.local):
    layer: _Layer | None = None


_current = _Current()


class _Forward:
    """A context manager, for a second time too, while which the layer of this thread is `layer`."""

    def __init__(self, layer: _Layer, mode: AbstractContextManager[Any], is_again: bool) -> None:
        self._layer, self._mode, self._is_again = layer, mode, is_again
        self._outer: _Layer | None = None

    def __enter__(self) -> None:
        self._mode.__enter__()
        self._outer, _current.layer = _current.layer, self._layer
        self._layer.begin(self._is_again)

    def __exit__(self, *error: Any) -> None:
        _current.layer = self._outer
        self._mode.__exit__(*error)


def _policy(layer: _Layer, _: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    kind = _kind(operator)
    is_kept = kind == "product" or (kind == "in batches" and any(map(_is_weight, args)))
    if kind != "view":
        layer.ends_with_product = is_kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _kind(operator: Any) -> str:
    name, _, overload = operator.name().partition(".")
    if overload == "out":  # into a tensor that is given, which the caller keeps
        return ""
    if name in _PRODUCTS or "grouped_mm" in name:
        return "product"
    return "in batches" if name in _IN_BATCHES else "view" if name in _VIEWS else ""


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
        next='activation_checkpointing="full" computes collectives again, too',
    )
