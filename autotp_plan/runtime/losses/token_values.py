"""What a policy's loss needs of logits: log-probabilities of tokens, entropies, Kullback-Leibler divergences.

No rank puts the logits together for it: each of them is a sum over the words, and the gradient of a rank's part needs
nothing of the others (as of the cross entropy: Shoeybi et al., 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from autotp_plan.runtime.losses.chunked_loss import output_layer
from autotp_plan.runtime.losses.deferred_logits import DeferredLogits, sharding_of
from autotp_plan.runtime.losses.word_chunks import Divergences, TokenValues, WordChunks
from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks, take
from autotp_plan.runtime.tensor_parallel.lazy_logits import LastDimSharding, LazilyGathered
from autotp_plan.runtime.tensor_parallel.torch_internals import assert_without_waiting, eager
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError

CHUNKS_OF_LOGITS = 32
"""In how many chunks logits are taken that are there: what is computed from them is as large as a chunk."""


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each given token. Every rank of the TP group calls it.

    Args:
        logits: `(..., vocab_size)`: of a forward inside `deferred_logits`, which are computed here in chunks; of a
            forward in training with labels, or from `logits_from_parts`, of which each rank has its part; or any
            tensor that is the same on every rank.
        tokens: `(...)` ids in the vocabulary, the same on every rank.

    Returns:
        `(...)`, the same on every rank, in float32 or better. `logits.log_softmax(-1)` at the tokens.

    Raises:
        ValueError: there are not as many tokens as logits.
        RuntimeError: a token is not in the vocabulary.
    """
    return _values(logits, tokens, with_entropies=False)[0]


def token_entropies(logits: Tensor) -> Tensor:
    """The entropy of each token's distribution, in nats. Every rank of the TP group calls it.

    Args:
        logits: as for `token_log_probs`.

    Returns:
        `(...)`, the same on every rank, in float32 or better. A word whose logit is -inf counts nothing.
    """
    return token_log_probs_and_entropies(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64))[1]


def token_log_probs_and_entropies(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Both `token_log_probs` and `token_entropies`, for which logits in chunks are computed once.

    Args:
        logits: as for `token_log_probs`.
        tokens: as for `token_log_probs`.

    Returns:
        Log-probabilities and entropies, both `(...)`.

    Raises:
        ValueError, RuntimeError: as `token_log_probs`.
    """
    return _values(logits, tokens, with_entropies=True)


def token_kl_divergences(logits: Tensor, other: Tensor) -> Tensor:
    """For each token sum of p (log p - log q) over the words, p by `logits` and q by `other`. Every rank calls it.

    Args:
        logits: as for `token_log_probs`.
        other: logits of the same shape, of the same model or of another whose vocabulary is sharded in the same way.

    Returns:
        `(...)`, the same on every rank, in float32 or better; with gradients to both.

    Raises:
        ValueError: the two have different shapes.
        MismatchError: the two are sharded differently.
    """
    if logits.shape != other.shape:
        raise ValueError(f"Logits of {tuple(logits.shape)} are compared with logits of {tuple(other.shape)}.")
    found = _divergences(logits, other)
    return found.view(logits.shape[:-1])


def logits_from_parts(model: nn.Module, part: Tensor) -> Tensor:
    """The logits of which each rank has computed its words' part. No communication.

    Args:
        model: a model from `load_model`, whose head says which words these are.
        part: this rank's, `(..., words of this rank)`.

    Returns:
        A tensor like `(..., vocab_size)`, for `token_log_probs` and its like; any other use gathers the parts.

    Raises:
        ValueError: the part is not of this rank's words.
        MismatchError: the model's head is not sharded by words.
    """
    sharding = sharding_of(output_layer(model))
    if part.shape[-1] != iv.length(sharding.held):
        raise ValueError(f"This rank has {iv.length(sharding.held)} words, and a part of {part.shape[-1]} was given.")
    return part if len(sharding.intervals) == 1 else LazilyGathered.of(part, sharding)


@eager
def _values(logits: Tensor, tokens: Tensor, with_entropies: bool) -> tuple[Tensor, Tensor]:
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(f"Got tokens of {tuple(tokens.shape)} for logits of {tuple(logits.shape)}.")
    vocabulary = logits.shape[-1]
    targets = tokens.reshape(-1).to(logits.device)
    known = (targets >= 0) & (targets < vocabulary)
    assert_without_waiting(known.all(), f"A token is not in the vocabulary. Expected: 0 to {vocabulary - 1}.")

    def values(chunks: WordChunks, *tensors: Tensor | None) -> Tensor:
        return torch.stack(TokenValues.apply(chunks, targets, with_entropies, *tensors))  # type: ignore[no-untyped-call]

    log_probs, entropies = _computed(logits, values)
    return log_probs.view(tokens.shape), entropies.view(tokens.shape)


def _computed(logits: Tensor, function: Callable[..., Tensor]) -> Tensor:
    """`function(chunks, *tensors)` of where the logits come from, or of this rank's part."""
    if isinstance(logits, DeferredLogits) and not logits.is_computed:
        return logits.compute(function)
    sharding, part = _part(logits)
    return function(WordChunks(sharding=sharding, count=CHUNKS_OF_LOGITS), part.flatten(0, -2))


def _part(logits: Tensor) -> tuple[LastDimSharding, Tensor]:
    """This rank's words, and their logits."""
    if isinstance(logits, LazilyGathered):
        shard = logits.shard
        if shard is not None:
            return logits.sharding, shard
        logits = logits.gathered()
    return LastDimSharding(None, (((0, logits.shape[-1]),),), 0), logits


@eager
def _divergences(logits: Tensor, other: Tensor) -> Tensor:
    shardings = [one.sharding for one in (logits, other) if _is_sharded(one)]
    if len(shardings) == 2 and not _are_same(*shardings):
        raise MismatchError(_sharded_differently(shardings))
    logits, other = (_sharded(one, shardings) for one in (logits, other))
    deferred = [one for one in (logits, other) if isinstance(one, DeferredLogits) and not one.is_computed]
    if len(deferred) == 2 and deferred[0].origin.head is deferred[1].origin.head:
        return _of_one_head(*deferred)

    def of_first(chunks: WordChunks, *tensors: Tensor | None) -> Tensor:
        def of_both(of_other: WordChunks, *others: Tensor | None) -> Tensor:
            return _apply(chunks, tensors, of_other, others)

        return _computed(other, of_both)

    return _computed(logits, of_first)


def _of_one_head(logits: DeferredLogits, other: DeferredLogits) -> Tensor:
    """Of two logits of one head, which is called once: ZeRO 3 counts how often it needs the weight."""

    head, chunks = logits.origin.head, logits.origin.chunks
    logits.origin.check_weights()
    other.origin.check_weights()

    def of_both(input: Tensor, *weights: Tensor | None) -> Tensor:
        hidden, sharding = input.flatten(0, -2), chunks.sharding
        of_other = copy_to_ranks(other.hidden, sharding.group) if head.is_tp_parallel else other.hidden
        others = (of_other.flatten(0, -2), *other.with_gradient(weights))
        return _apply(chunks, (hidden, *logits.with_gradient(weights)), other.origin.chunks, others)

    return head(logits.hidden, compute=of_both)


def _apply(
    chunks: WordChunks, tensors: Sequence[Tensor | None], of_other: WordChunks, others: Sequence[Tensor | None]
) -> Tensor:
    found: Tensor = Divergences.apply(chunks, of_other.in_step_with(chunks), len(tensors), *tensors, *others)  # type: ignore[no-untyped-call]
    return found


def _is_sharded(logits: Tensor) -> TypeGuard[LazilyGathered]:
    if isinstance(logits, DeferredLogits):
        return not logits.is_computed
    return isinstance(logits, LazilyGathered) and logits.shard is not None


def _are_same(one: LastDimSharding, other: LastDimSharding) -> bool:
    return list(one.intervals) == list(other.intervals) and one.tp_rank == other.tp_rank


def _sharded(logits: Tensor, shardings: Sequence[LastDimSharding]) -> Tensor:
    """Logits that are the same on every rank as this rank's part, where those they are compared with are sharded."""
    if not shardings or _is_sharded(logits) or len(shardings[0].intervals) == 1:
        return logits
    full = logits.gathered() if isinstance(logits, LazilyGathered) else logits
    sharding = shardings[0]
    copied = copy_to_ranks(full, sharding.group)
    return LazilyGathered.of(take(copied, sharding.held, full.dim() - 1), sharding)


def _sharded_differently(shardings: Sequence[LastDimSharding]) -> Fault:
    held = [f"{len(one.intervals)} ranks, of which this has {iv.length(one.held)} words" for one in shardings]
    return Fault(
        code="logits-sharded-differently",
        what="the vocabularies of two models are sharded differently",
        where="token_kl_divergences",
        got="; ".join(held),
        expected="the same words of both on each rank",
        next="compile both plans with one tp_size, or give the logits of one as a tensor that every rank has",
    )
