"""How a transformers model computes its loss from logits in chunks: its head is asked for none while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from autotp_plan.runtime.deepspeed.internals import are_all_of_deepspeed
from autotp_plan.runtime.losses.deferred_logits import DeferredLogits, Forward, Origin, sharding_of, weights_now
from autotp_plan.runtime.losses.model_forward import run_forward_in
from autotp_plan.runtime.losses.vocab_loss import causal_lm_loss
from autotp_plan.runtime.losses.word_chunks import WordChunks
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear
from autotp_plan.runtime.tensor_parallel.torch_internals import forward_hooks, forward_pre_hooks
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError


def check_loss_chunks(chunks: int | None, vocab_parallel_loss: bool) -> None:
    """Check the option of `load_model`.

    Raises:
        OptionError: it is less than 1, or the vocabulary-parallel loss is switched off.
    """
    if chunks is None:
        return
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise OptionError(
            Fault(
                code="loss-chunks",
                what="the number of chunks of the loss makes no sense",
                where="loss_chunks",
                got=repr(chunks),
                expected="a whole number from 1, or None",
                next="give loss_chunks=32",
            )
        )
    if not vocab_parallel_loss:
        raise OptionError(
            Fault(
                code="loss-chunks-of-full-logits",
                what="a loss in chunks is computed from each rank's logits",
                where="loss_chunks",
                got="vocab_parallel_loss=False",
                expected="vocab_parallel_loss=True, or loss_chunks=None",
                next="leave one of the two out",
            )
        )


def use_chunked_loss(model: nn.Module, chunks: int) -> None:
    """Let a model in training compute the loss of labels from logits of a chunk of words at a time.

    Args:
        model: a model with its layers replaced.
        chunks: how many.

    Raises:
        MismatchError: its loss or its head is another than what is known to be right.
    """
    loss = getattr(model, "loss_function", None)
    if loss is not ForCausalLMLoss and loss is not causal_lm_loss:
        name = str(getattr(loss, "__name__", "a loss of its own" if loss is None else loss))
        raise MismatchError(_not_in_chunks(model, f"its loss is {name}", "ForCausalLMLoss of transformers"))
    _head(model)
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    run_forward_in(model, _deferring(chunks, always=False))


@contextlib.contextmanager
def deferred_logits(model: nn.Module, chunks: int = 32) -> Iterator[None]:
    """While active, forwards of a model return logits that are not computed, for `token_log_probs` and its like.

    These compute them from hidden states, a chunk of words at a time. Any other use of `output.logits` computes all of
    them, at once, after the forward; every rank of the TP group must make the same use. Slices of tokens, and numbers
    that scale the logits (`logits[:, :-1] / temperature`), compute nothing.

    Args:
        model: a transformers model from `load_model`, or an engine or PeftModel around it.
        chunks: in how many chunks a rank's words are taken.

    Raises:
        MismatchError: the model's head is another than what is known to be right.
        OptionError: `chunks` is less than 1.
    """
    check_loss_chunks(chunks, True)
    inside: Any = _of_load_model(model)
    _head(inside)
    before = vars(inside).get("forward")
    run_forward_in(inside, _deferring(chunks, always=True))
    try:
        yield
    finally:
        if before is None:
            del inside.forward
        else:
            inside.forward = before


def output_layer(model: nn.Module) -> ColumnParallelLinear:
    """The layer that makes the logits of a model from `load_model`, or of an engine or PeftModel around it.

    Raises:
        MismatchError: it is no layer of which each rank has words that no other has.
    """
    return _head(_of_load_model(model))


def _of_load_model(model: nn.Module) -> nn.Module:
    return next((one for one in model.modules() if "autotp" in vars(one)), model)


def _deferring(chunks: int, *, always: bool) -> Callable[[Any, Any], AbstractContextManager[None] | None]:
    """What a forward runs in whose head is asked for no logits: `always`, or for the loss of labels alone."""

    def deferring(model: Any, labels: Any) -> AbstractContextManager[None] | None:
        for_loss = model.training and labels is not None and model.loss_function is causal_lm_loss
        if not (always or for_loss):
            return None
        if torch.compiler.is_compiling():
            raise MismatchError(_not_in_chunks(model, "its forward is compiled by torch.compile", "one that is not"))
        head = _head(model)
        return None if head.defer_product is not None else _deferred_product(model, head, chunks)

    return deferring


@contextlib.contextmanager
def _deferred_product(model: nn.Module, head: ColumnParallelLinear, chunks: int) -> Iterator[None]:
    hooks = [*forward_pre_hooks(head), *forward_hooks(head)]
    if hooks and not are_all_of_deepspeed(hooks):
        raise MismatchError(_not_in_chunks(model, "its head has a forward hook", "a head without hooks of others"))
    running = Forward(type(model).__name__)

    def defer(hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        of_words = WordChunks(sharding=sharding_of(head), count=chunks, product_dtype=dtype)
        origin = Origin(
            head=head,
            chunks=of_words,
            dtype=dtype or hidden.dtype,
            forward=running,
            weights=weights_now(head),
            is_detached=not torch.is_grad_enabled(),
        )
        return DeferredLogits.of_hidden(hidden, origin)

    head.defer_product = defer
    try:
        yield
    finally:
        head.defer_product = None
        running.running = False


def _head(model: nn.Module) -> ColumnParallelLinear:
    """The layer that makes the logits, of which each rank has words that no other has."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, ColumnParallelLinear):
        found = "it has no head" if head is None else f"its head is a {type(head).__module__}.{type(head).__name__}"
        raise MismatchError(_not_in_chunks(model, found, "a column-parallel head, without an adapter of its own"))
    if head.is_tp_parallel:
        held = head.shards.layouts["weight"].intervals
        if len(iv.holders(held)) != sum(len(rank) for rank in held) or not all(map(iv.length, held)):
            raise MismatchError(_not_in_chunks(model, "ranks that share words, or have none", "words for each rank"))
        if not head.gather_output:
            raise MismatchError(_not_in_chunks(model, "its head's output is not gathered", "an output that is"))
    return head


def _not_in_chunks(model: nn.Module, got: str, expected: str) -> Fault:
    return Fault(
        code="no-loss-in-chunks",
        what="the logits of this model cannot be computed in chunks",
        where=type(model).__name__,
        got=got,
        expected=expected,
        next="load_model without loss_chunks",
    )
