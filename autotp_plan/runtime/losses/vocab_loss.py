"""The vocabulary-parallel loss of a transformers causal LM, which never gathers the logits.

The cross entropy of a token needs three numbers over the whole vocabulary: the largest logit, the sum of exponentials,
and the target's logit. Each rank computes its part of them (Shoeybi et al., 2019, section 3). The gradient of a rank's
logits, softmax minus one-hot, then needs no communication.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from autotp_plan.runtime.losses.deferred_logits import DeferredLogits
from autotp_plan.runtime.losses.model_forward import run_forward_in
from autotp_plan.runtime.losses.word_chunks import TokenValues, WordChunks
from autotp_plan.runtime.tensor_parallel.embedding import find_held
from autotp_plan.runtime.tensor_parallel.lazy_logits import LastDimSharding, LazilyGathered
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear
from autotp_plan.runtime.tensor_parallel.torch_internals import assert_without_waiting, eager
from autotp_plan.schemas import intervals as iv


def use_vocab_parallel_loss(model: nn.Module) -> bool:
    """Let a sharded model compute its loss from each rank's logits, where it can.

    It can when it is a transformers model whose loss is `ForCausalLMLoss`, and its head is a column-parallel layer with
    gathered output in which each rank has words that no other has.

    Args:
        model: a model with its layers replaced.

    Returns:
        Whether it does from now on.
    """
    head = _head(model)
    if head is None or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return False
    held = head.shards.layouts["weight"].intervals
    if len(iv.holders(held)) != sum(len(rank) for rank in held) or not all(map(iv.length, held)):
        return False
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    run_forward_in(model, _deferring_gather)
    return True


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, which it calls unless the logits are still sharded.

    Args:
        logits: `(batch, length, vocab_size)`.
        labels: `(batch, length)` token ids; position `n` is scored by the logits of `n - 1`.
        vocab_size: the model's.
        num_items_in_batch: what to divide the sum over the tokens by; None takes the mean.
        ignore_index: the label of tokens that do not count.
        shift_labels: labels that are shifted already, taken instead of `labels`.
        kwargs: for transformers.

    Returns:
        The loss, a scalar, the same on every rank.

    Raises:
        ValueError: there are not as many labels as logits.
        RuntimeError: a label is not in the vocabulary.
    """
    of_vocabulary = isinstance(logits, LazilyGathered) and logits.shape[-1] == vocab_size
    if of_vocabulary and isinstance(logits, DeferredLogits):
        losses = functools.partial(_losses_in_chunks, logits)
        return _mean_loss(losses, logits.device, labels, num_items_in_batch, ignore_index, shift_labels)
    if of_vocabulary and logits.shard is not None:  # type: ignore[attr-defined]
        sharding, shard = logits.sharding, logits.shard  # type: ignore[attr-defined]
        return _loss_of_shard(sharding, shard, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
    loss: Tensor = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    return loss


def keep_logits_sharded(model: nn.Module) -> bool:
    """Let a model with a vocabulary-parallel loss compute its loss from logits that no code may read but its own.

    `LazilyGathered` looks like the full logits until it is read; here the output's logits are this rank's shard. It is
    for runs of which only the loss is wanted, on tensors that have no data.

    Args:
        model: a model for which `use_vocab_parallel_loss` returned True.

    Returns:
        Whether it does from now on.
    """
    head = _head(model)
    if head is None or getattr(model, "loss_function", None) is not causal_lm_loss:
        return False
    shards = head.shards
    sharding = LastDimSharding(shards.group, shards.layouts["weight"].intervals, shards.tp_rank)
    head.gather_output = False
    model.loss_function = functools.partial(_loss_of_shard, sharding)  # type: ignore[assignment]
    return True


def _loss_of_shard(
    sharding: LastDimSharding,
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As `causal_lm_loss`, of this rank's shard of the logits."""
    flat = logits.float().flatten(0, -2)

    def losses(targets: Tensor, ignore_index: int) -> Tensor:
        return vocab_parallel_cross_entropy(flat, targets, sharding, ignore_index)

    return _mean_loss(losses, logits.device, labels, num_items_in_batch, ignore_index, shift_labels)


def _mean_loss(
    losses_of: Callable[[Tensor, int], Tensor],
    device: torch.device,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
    shift_labels: Tensor | None,
) -> Tensor:
    """The mean of `losses_of(targets, ignore_index)`, both `(tokens,)`, for arguments as of `causal_lm_loss`."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(device)
    losses = losses_of(targets, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    mean: Tensor = losses.sum() / num_items_in_batch
    return mean


@eager
def _losses_in_chunks(logits: DeferredLogits, targets: Tensor, ignore_index: int) -> Tensor:
    """As `vocab_parallel_cross_entropy`, of logits that are computed in chunks."""
    _check_targets(targets, logits.shape[:-1].numel(), logits.sharding, ignore_index)

    def losses(chunks: WordChunks, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        log_probs: Tensor
        log_probs, _ = TokenValues.apply(chunks, targets, False, hidden, weight, bias)  # type: ignore[no-untyped-call]
        return -log_probs

    as_float: Any = logits.float()  # as `ForCausalLMLoss` does
    found: Tensor = as_float.compute(losses)
    return found.masked_fill(targets == ignore_index, 0.0)


def _check_targets(targets: Tensor, tokens: int, sharding: LastDimSharding, ignore_index: int) -> None:
    if targets.shape != (tokens,):
        raise ValueError(
            f"The labels do not belong to the logits. Got: {targets.numel()} labels for the logits of "
            f"{tokens} tokens. Expected: as many. Next: give labels for the same tokens (logits_to_keep?)."
        )
    known = (targets == ignore_index) | ((targets >= 0) & (targets < sharding.size))
    assert_without_waiting(  # as torch's cross entropy
        known.all(),
        f"A label is not in the vocabulary. Expected: 0 to {sharding.size - 1}, or {ignore_index} to ignore.",
    )


@eager
def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, sharding: LastDimSharding, ignore_index: int = -100
) -> Tensor:
    """The cross entropy of each token, the same on every rank; 0 for a target of `ignore_index`.

    Args:
        logits: `(tokens, words of this rank)`, in the precision to compute in.
        targets: `(tokens,)` ids in the whole vocabulary, the same on every rank.
        sharding: which words each rank has.
        ignore_index: the target of tokens that do not count.

    Returns:
        The cross entropies, `(tokens,)`.

    Raises:
        ValueError: there are not as many targets as logits.
        RuntimeError: a target is not in the vocabulary.
    """
    _check_targets(targets, logits.shape[0], sharding, ignore_index)
    losses: Tensor = _CrossEntropy.apply(logits, targets, sharding, ignore_index)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, sharding: LastDimSharding, ignore_index: int) -> Tensor:
        highest = logits.amax(dim=-1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=sharding.group)
        softmax = logits - highest.unsqueeze(-1)
        column, mine = find_held(targets, sharding.held)
        column = column.unsqueeze(-1)
        target = softmax.gather(-1, column).squeeze(-1).masked_fill(~mine, 0.0)
        softmax.exp_()
        sums = torch.stack((softmax.sum(dim=-1), target))
        dist.all_reduce(sums, group=sharding.group)
        total, target = sums
        softmax.div_(total.unsqueeze(-1))
        counted = targets != ignore_index
        ctx.save_for_backward(softmax, column, mine & counted, counted)
        losses: Tensor = total.log() - target
        return losses.masked_fill(~counted, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, mine, counted = ctx.saved_tensors
        grad_tokens = grad_output.masked_fill(~counted, 0.0).unsqueeze(-1)
        grad_logits = softmax * grad_tokens
        grad_logits.scatter_add_(-1, column, -grad_tokens.masked_fill(~mine.unsqueeze(-1), 0.0))
        return grad_logits, None, None, None


def _head(model: nn.Module) -> ColumnParallelLinear | None:
    """The layer that makes the logits, where it is column-parallel and its output is gathered."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    is_sharded = isinstance(head, ColumnParallelLinear) and head.gather_output and head.is_tp_parallel
    return head if is_sharded else None


def _deferring_gather(model: Any, labels: Any) -> AbstractContextManager[None] | None:
    """What a forward of `labels` runs in."""
    head = _head(model)
    ours = model.loss_function is causal_lm_loss  # until someone sets another
    traced = torch.compiler.is_compiling()  # torch.compile guards sizes that a shard only seems to have
    if head is None or labels is None or traced or not (ours and model.training):
        return None
    return _gather_deferred(head)


@contextlib.contextmanager
def _gather_deferred(head: ColumnParallelLinear) -> Iterator[None]:
    head.defer_gather = True
    try:
        yield
    finally:
        head.defer_gather = False
