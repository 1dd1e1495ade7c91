"""Log-probabilities, entropies and divergences from chunks of the words, and their gradients, against torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autotp_plan.runtime.estimate.fake_internals import Watch
from autotp_plan.runtime.losses.word_chunks import Divergences, TokenValues, WordChunks
from autotp_plan.runtime.tensor_parallel.lazy_logits import LastDimSharding

TOKENS, FEATURES, WORDS = 13, 8, 37
COUNTS = (1, 3, 5, 37, 50)
CAP: tuple[Callable[[Tensor], Tensor], ...] = (lambda logits: logits / 3, torch.tanh, lambda logits: logits * 3)


def chunks(count: int, steps: Any = ()) -> WordChunks:
    return WordChunks(sharding=LastDimSharding(None, (((0, WORDS),),), 0), count=count, steps=steps)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def worst(found: Any, expected: Any) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("steps", [(), CAP], ids=["plain", "capped"])
@pytest.mark.parametrize("count", COUNTS)
def test_values_and_gradients_from_hidden_states(count: int, steps: Any) -> None:
    torch.manual_seed(count)
    hidden, weight, bias = random(TOKENS, FEATURES), random(WORDS, FEATURES), random(WORDS)
    others = random(TOKENS, FEATURES), random(WORDS, FEATURES)
    targets, factors = torch.randint(0, WORDS, (TOKENS,)), torch.randn(3, TOKENS, dtype=torch.float64)
    both = TokenValues.apply(chunks(count, steps), targets, True, hidden, weight, bias)
    values = *both, Divergences.apply(chunks(count, steps), chunks(count), 3, hidden, weight, bias, *others, None)
    logits = hidden @ weight.t() + bias
    for step in steps:
        logits = step(logits)
    log_probs, log_probs_of_other = logits.log_softmax(-1), (others[0] @ others[1].t()).log_softmax(-1)
    expected = (
        log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        -(log_probs.exp() * log_probs).sum(-1),
        (log_probs.exp() * (log_probs - log_probs_of_other)).sum(-1),
    )
    assert worst(values, expected) < 1e-12
    inputs = (hidden, weight, bias, *others)
    gradients = torch.autograd.grad((torch.stack(values) * factors).sum(), inputs)
    assert worst(gradients, torch.autograd.grad((torch.stack(expected) * factors).sum(), inputs)) < 1e-12


@pytest.mark.parametrize("count", COUNTS)
def test_values_and_gradients_from_logits_with_words_that_are_masked(count: int) -> None:
    torch.manual_seed(count)
    logits, others = random(TOKENS, WORDS), random(TOKENS, WORDS)
    masked = torch.zeros(TOKENS, WORDS, dtype=torch.bool)
    masked[:, :20] = True
    parts = [one.masked_fill(masked, -torch.inf) for one in (logits, others)]
    targets = torch.randint(20, WORDS, (TOKENS,))
    values = [*TokenValues.apply(chunks(count), targets, True, parts[0])]
    values.append(Divergences.apply(chunks(count), chunks(count), 1, parts[0], parts[1]))
    log_probs, log_probs_of_other = (one[:, 20:].log_softmax(-1) for one in (logits, others))
    expected = [
        log_probs.gather(-1, targets.unsqueeze(-1) - 20).squeeze(-1),
        -(log_probs.exp() * log_probs).sum(-1),
        (log_probs.exp() * (log_probs - log_probs_of_other)).sum(-1),
    ]
    assert worst(values, expected) < 1e-12
    gradients = torch.autograd.grad(torch.stack(values).sum(), (logits, others))
    assert worst(gradients, torch.autograd.grad(torch.stack(expected).sum(), (logits, others))) < 1e-12


def test_only_gradients_that_are_wanted_are_computed() -> None:
    hidden, weight, bias = random(TOKENS, FEATURES), random(WORDS, FEATURES).detach(), random(WORDS)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    TokenValues.apply(chunks(4), targets, False, hidden, weight, bias)[0].sum().backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None


def test_less_than_a_twentieth_of_the_logits_is_alive() -> None:
    words, tokens, features = 32768, 256, 64
    hidden = torch.randn(tokens, features, requires_grad=True)
    weight = torch.randn(words, features, requires_grad=True)
    of_words = WordChunks(sharding=LastDimSharding(None, (((0, words),),), 0), count=64)
    targets = torch.randint(0, words, (tokens,))
    with Watch(lambda *_: None, held=[hidden, weight, targets]) as watch:
        loss = -TokenValues.apply(of_words, targets, False, hidden, weight, None)[0].mean()
        forward, kept = watch.restart_peak(), watch.live
        loss.backward()
        backward = watch.restart_peak() - 4 * (hidden.numel() + weight.numel())
    logits = 4 * tokens * words
    assert max(forward, backward) < 0.05 * logits
    assert kept < 0.001 * logits


def test_bfloat16_gradients_are_as_exact_as_without_chunks() -> None:
    torch.manual_seed(0)
    words, tokens = 4096, 512
    sharding = LastDimSharding(None, (((0, words),),), 0)
    exact = [torch.randn(tokens, 64, dtype=torch.float64), torch.randn(words, 64, dtype=torch.float64) / 8]
    targets = torch.randint(0, words, (tokens,))

    def gradients(dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        inputs = [one.bfloat16().to(dtype).requires_grad_() for one in exact]
        return [one.double() for one in torch.autograd.grad(loss(*inputs), inputs)]

    def at_once(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        return torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def in_chunks(hidden: Tensor, weight: Tensor) -> Tensor:
        of_words = WordChunks(sharding=sharding, count=64)
        return -TokenValues.apply(of_words, targets, False, hidden, weight, None)[0].mean()

    right = gradients(torch.float64, at_once)
    mean = [
        [((one - other).square().mean() / other.square().mean()).sqrt().item() for one, other in zip(found, right)]
        for found in (gradients(torch.bfloat16, at_once), gradients(torch.bfloat16, in_chunks))
    ]
    (hidden, weight), (hidden_in_chunks, weight_in_chunks) = mean  # a CPU rounds each chunk's product to bfloat16
    assert weight_in_chunks < 1.02 * weight and hidden_in_chunks < 1.4 * hidden, mean
