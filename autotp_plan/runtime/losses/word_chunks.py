"""Logits that are computed a chunk of this rank's words at a time, and what a token needs of all of them.

A chunk is some words of all tokens, not all words of some tokens. The gradient of a word's weight is then one product
over all tokens, in the weight's own dtype and as exact as without chunks, and nothing of the weight's size is needed to
add it up; the collectives are those of logits that are computed at once. What has to be added up over the chunks is the
gradient of the hidden states, in float32 or better. The softmax of the first chunk is known after the last one: each
chunk is computed in the forward, and again in the backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.tensor_parallel.embedding import find_held
from autotp_plan.runtime.tensor_parallel.lazy_logits import LastDimSharding
from autotp_plan.schemas import intervals as iv

Step = Callable[[Tensor], Tensor]
"""What happens to each logit by itself: scaling, a soft cap, another dtype."""
Tensors = Sequence[Tensor | None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WordChunks:
    """How this rank's logits come about. They are functions of tensors, which are given to the methods.

    Those are hidden states `(tokens, in_features)`, weight `(words of this rank, in_features)` and bias or None; or, of
    logits that are there, `(tokens, words of this rank)` alone.

    Attributes:
        sharding: which words each rank has.
        count: number of chunks.
        steps: what happens to the logits, in this order.
        product_dtype: what `torch.autocast` computes the product in; None for the dtype of the tensors.
    """

    sharding: LastDimSharding
    count: int
    steps: tuple[Step, ...] = ()
    product_dtype: torch.dtype | None = None

    def __iter__(self) -> Iterator[slice]:
        words = iv.length(self.sharding.held)
        size = max(1, math.ceil(words / self.count))
        return (slice(start, min(start + size, words)) for start in range(0, words, size))

    def in_step_with(self, other: WordChunks) -> WordChunks:
        """The same logits in as many chunks as `other`."""
        return replace(self, count=other.count)

    def prepared(self, tensors: Tensors) -> Tensors:
        """The tensors in the dtype of the product, where it is small: the weight is converted by chunks."""
        hidden, *others = tensors
        return (self._converted(hidden), *others)

    def _converted(self, tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or self.product_dtype is None else tensor.to(self.product_dtype)

    def product(self, tensors: Tensors, words: slice) -> Tensor:
        """The logits of `words` before the steps, `(tokens, words)`."""
        hidden, *of_head = tensors
        assert hidden is not None
        if not of_head:
            return hidden[:, words]
        weight, bias = of_head
        assert weight is not None
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if bias is None else self._converted(bias[words])
            return F.linear(hidden, self._converted(weight[words]), bias)  # type: ignore[arg-type]

    def finished(self, product: Tensor) -> Tensor:
        """The logits after the steps, in float32 or better."""
        for step in self.steps:
            product = step(product)
        return product.to(torch.promote_types(product.dtype, torch.float32))

    def logits(self, tensors: Tensors, words: slice) -> Tensor:
        """The finished logits of `words`."""
        return self.finished(self.product(tensors, words))


class Gradients:
    """The gradients of the tensors of `WordChunks`, made chunk by chunk.

    Args:
        chunks: how the logits come about.
        tensors: what they come from.
        needed: for each whether its gradient is wanted.
    """

    def __init__(self, chunks: WordChunks, tensors: Tensors, needed: Sequence[bool]) -> None:
        self.chunks, self.tensors = chunks, chunks.prepared(tensors)
        self.dtypes = [None if one is None else one.dtype for one in tensors]
        made = zip(tensors, needed)
        self.found = [torch.empty_like(one) if one is not None and wanted else None for one, wanted in made]
        first = tensors[0]
        if self.found[0] is not None and len(tensors) > 1 and first is not None:
            self.found[0] = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))

    def add(self, words: slice, gradient_of: Callable[[Tensor], Tensor]) -> None:
        """Compute the logits of `words`, and what their gradient, by a function of them, adds to the gradients."""
        product = self.chunks.product(self.tensors, words)
        with torch.enable_grad():
            product = product.detach().requires_grad_()
            logits = self.chunks.finished(product)
        gradient = gradient_of(logits.detach())
        (gradient,) = torch.autograd.grad(logits, product, gradient)
        del logits
        self._add(words, gradient)

    def _add(self, words: slice, gradient: Tensor) -> None:
        if len(self.tensors) == 1:
            if self.found[0] is not None:
                self.found[0][:, words] = gradient
            return
        (hidden, weight, _), (of_hidden, of_weight, of_bias) = self.tensors, self.found
        assert hidden is not None and weight is not None
        if of_hidden is not None:
            converted = weight[words].to(gradient.dtype)
            if of_hidden.dtype == gradient.dtype:
                of_hidden.addmm_(gradient, converted)
            else:
                of_hidden.add_(gradient @ converted)
        if of_weight is not None:
            of_weight[words] = gradient.t() @ hidden
        if of_bias is not None:
            of_bias[words] = gradient.sum(dim=0)

    def result(self) -> list[Tensor | None]:
        """The gradients, in the dtypes of the tensors."""
        return [None if one is None or dtype is None else one.to(dtype) for one, dtype in zip(self.found, self.dtypes)]


class TokenValues(torch.autograd.Function):
    """The log-probability of each token's target, and the entropy of its distribution, the same on every rank.

    `apply(chunks, targets, with_entropies, *tensors)` with targets `(tokens,)` of the whole vocabulary; the logit of
    one that no rank has is taken for 0. Returns two tensors `(tokens,)`; entropies are zeros unless asked for.
    """

    @staticmethod
    def forward(ctx: Any, chunks: WordChunks, targets: Tensor, with_entropies: bool, *tensors: Any) -> Any:
        prepared = chunks.prepared(tensors)
        column, mine = find_held(targets, chunks.sharding.held)
        sums = _RunningSums()
        target: Any = 0.0
        for words in chunks:
            logits = chunks.logits(prepared, words)
            place, inside = _in_chunk(words, column, mine)
            target = target + logits.gather(-1, place).squeeze(-1).masked_fill_(~inside, 0.0)
            sums.add(logits, logits if with_entropies else None)
            del logits
        highest, (total, target, *weighted) = sums.over_ranks(chunks.sharding, target)
        log_sum = total.log_().add_(highest)
        entropies = log_sum - weighted[0] if with_entropies else torch.zeros_like(log_sum)
        ctx.chunks, ctx.with_entropies = chunks, with_entropies
        ctx.save_for_backward(log_sum, entropies, column, mine, *tensors)
        ctx.set_materialize_grads(False)
        return target - log_sum, entropies

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropies: Tensor | None) -> Any:
        log_sum, entropies, column, mine, *tensors = ctx.saved_tensors
        gradients = Gradients(ctx.chunks, tensors, ctx.needs_input_grad[3:])
        if of_log_probs is None:
            of_log_probs = torch.zeros_like(log_sum)

        def gradient_of(logits: Tensor, words: slice) -> Tensor:
            log_probs = logits - log_sum.unsqueeze(-1)
            factor = -of_log_probs.unsqueeze(-1)
            if of_entropies is None or not ctx.with_entropies:
                made: Tensor = log_probs.exp_().mul_(factor)
            else:
                made = torch.exp(log_probs)
                apart = log_probs.masked_fill_(made == 0, 0.0).add_(entropies.unsqueeze(-1))
                made.mul_(apart.mul_(-of_entropies.unsqueeze(-1)).add_(factor))
            place, inside = _in_chunk(words, column, mine)
            made.scatter_add_(-1, place, (of_log_probs * inside).unsqueeze(-1).to(made.dtype))
            return made

        for words in ctx.chunks:
            gradients.add(words, functools.partial(gradient_of, words=words))
        return None, None, None, *gradients.result()


class Divergences(torch.autograd.Function):
    """The Kullback-Leibler divergence of each token's distribution from another, the same on every rank.

    `apply(chunks, of_other, count, *tensors)`: `tensors` are the `count` of `chunks`, then those of `of_other`, which
    has the same words on each rank and as many chunks. Returns the sum over the words of p (log p - log q), for each
    token.
    """

    @staticmethod
    def forward(ctx: Any, chunks: WordChunks, of_other: WordChunks, count: int, *tensors: Any) -> Any:
        prepared, others = chunks.prepared(tensors[:count]), of_other.prepared(tensors[count:])
        sums, sums_of_other = _RunningSums(), _RunningSums()
        for words in chunks:
            logits, other = chunks.logits(prepared, words), of_other.logits(others, words)
            sums.add(logits, logits - other)
            sums_of_other.add(other)
            del logits, other
        highest, (total, apart) = sums.over_ranks(chunks.sharding)
        highest_of_other, (total_of_other,) = sums_of_other.over_ranks(chunks.sharding)
        log_sum, log_sum_of_other = total.log() + highest, total_of_other.log() + highest_of_other
        divergences = apart - log_sum + log_sum_of_other
        ctx.chunks, ctx.of_other, ctx.count = chunks, of_other, count
        ctx.save_for_backward(log_sum, log_sum_of_other, divergences, *tensors)
        return divergences

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        log_sum, log_sum_of_other, divergences, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        gradients = Gradients(ctx.chunks, tensors[: ctx.count], needed[: ctx.count])
        of_other = Gradients(ctx.of_other, tensors[ctx.count :], needed[ctx.count :])
        factor = grad_output.unsqueeze(-1)

        def gradient_of(logits: Tensor, words: slice) -> Tensor:
            log_probs = logits - log_sum.unsqueeze(-1)
            other = ctx.of_other.logits(of_other.tensors, words) - log_sum_of_other.unsqueeze(-1)
            probs = log_probs.exp()
            apart = log_probs.sub_(other).sub_(divergences.unsqueeze(-1)).masked_fill_(probs == 0, 0.0)
            result: Tensor = probs.mul_(apart).mul_(factor)
            return result

        def gradient_of_other(other: Tensor, words: slice) -> Tensor:
            probs = (ctx.chunks.logits(gradients.tensors, words) - log_sum.unsqueeze(-1)).exp_()
            result: Tensor = (other - log_sum_of_other.unsqueeze(-1)).exp_().sub_(probs).mul_(factor)
            return result

        for words in ctx.chunks:
            if any(needed[: ctx.count]):
                gradients.add(words, functools.partial(gradient_of, words=words))
            if any(needed[ctx.count :]):
                of_other.add(words, functools.partial(gradient_of_other, words=words))
        return None, None, None, *gradients.result(), *of_other.result()


class _RunningSums:
    """For each token the largest logit so far, the sum of exp(logit - largest), and a sum weighted by these."""

    def __init__(self) -> None:
        self.highest: Any = None
        self.sums: list[Tensor] = []

    def add(self, logits: Tensor, weighted: Tensor | None = None) -> None:
        """Add a chunk of logits, and of what is to be summed with their exponentials as weights."""
        highest = logits.amax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min)  # where every word is masked: -inf
        if self.highest is not None:
            highest = torch.maximum(highest, self.highest)
            self._move_to(highest)
        exponentials = (logits - highest.unsqueeze(-1)).exp_()
        found = [exponentials.sum(dim=-1)]
        if weighted is not None:
            found.append(exponentials.mul_(weighted.masked_fill(exponentials == 0, 0.0)).sum(dim=-1))
        self.sums = [one + other for one, other in zip(found, self.sums)] if self.sums else found
        self.highest = highest

    def _move_to(self, highest: Tensor) -> None:
        factor = (self.highest - highest).exp_()
        self.sums = [one * factor for one in self.sums]
        self.highest = highest

    def over_ranks(self, sharding: LastDimSharding, *others: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of all ranks: the largest logit; the sum of exponentials, the sums of `others`, and the weighted mean."""
        several = len(sharding.intervals) > 1
        if several:
            highest = self.highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=sharding.group)
            self._move_to(highest)
        total, *weighted = self.sums
        summed = torch.stack([total, *others, *weighted])
        if several:
            dist.all_reduce(summed, group=sharding.group)
        total, *found = summed
        return self.highest, [total, *found[: len(others)], *(one / total for one in found[len(others) :])]


def _in_chunk(words: slice, column: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """Where the targets lie in a chunk, `(tokens, 1)`, 0 where they do not; and whether they do, `(tokens,)`."""
    inside = mine & (column >= words.start) & (column < words.stop)
    return (column - words.start).masked_fill_(~inside, 0).unsqueeze(-1), inside
