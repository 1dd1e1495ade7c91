"""Log-probabilities, entropies and divergences of a sharded model: the dense model's, with every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.communication import planted
from tests.helpers.launch import launch
from tests.runtime.losses.test_loss_chunks import load, said
from tests.runtime.losses.test_vocab_parallel_loss import widest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

VARIANTS: dict[str, dict[str, Any]] = {"llama_bias_tied": {"vocab_size": 257}, "gemma2": {}, "phi": {}}
TEMPERATURE = 0.7
FEATURES = 64


def dense_values(logits: Any, other: Any, reference: Any, tokens: Any) -> Any:
    """By torch: log-probabilities, entropies, the divergence from `other`, and that of `reference`."""
    import torch

    log_probs, of_other, of_reference = (one.log_softmax(-1) for one in (logits, other, reference))
    return torch.stack([
        log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
        -(log_probs.exp() * log_probs).sum(-1),
        (log_probs.exp() * (log_probs - of_other)).sum(-1),
        (of_reference.exp() * (of_reference - log_probs)).sum(-1),
    ])  # fmt: skip


def our_values(logits: Any, other: Any, reference: Any, tokens: Any) -> Any:
    import torch

    from autotp_plan.runtime import token_kl_divergences, token_log_probs_and_entropies

    both = token_log_probs_and_entropies(logits, tokens)
    return torch.stack([*both, token_kl_divergences(logits, other), token_kl_divergences(reference, logits)])


def forward(values: Any, ways: tuple[str, str, str]) -> Any:
    """A forward with a loss of three logits: of the tokens, of others, and of a reference without gradients."""
    import torch

    from autotp_plan.runtime import deferred_logits, logits_from_parts

    def computed(model: Any, tokens: Any, way: str) -> Any:
        if way == "deferred":
            with deferred_logits(model, 5):
                return model(input_ids=tokens, use_cache=False).logits
        if way == "in training":
            return model(input_ids=tokens, labels=tokens, use_cache=False).logits
        if way == "parts":
            lazy = model(input_ids=tokens, labels=tokens, use_cache=False).logits
            return logits_from_parts(model, lazy.shard)
        return model(input_ids=tokens, use_cache=False).logits

    def of_model(model: Any, tokens: Any) -> Any:
        logits = computed(model, tokens, ways[0])[:, :-1] / TEMPERATURE
        other = computed(model, tokens.flip(1), ways[1])[:, :-1] / TEMPERATURE
        with torch.no_grad():
            reference = computed(model, tokens.roll(3, 1), ways[2])[:, :-1]
        found = values(logits, other, reference, tokens[:, 1:])
        factors = torch.tensor([-1.0, 0.3, 0.5, 2.0], dtype=torch.float64).view(4, 1, 1)
        return (found * factors).mean(), found.detach()

    return of_model


WAYS = {
    "deferred": ("deferred", "deferred", "deferred"),
    "as tensors": ("all", "all", "all"),
    "in training": ("in training", "in training", "parts"),
    "mixed": ("deferred", "in training", "all"),
    "mixed, the other way": ("all", "deferred", "parts"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from autotp_plan.planner import compile_plan
    from tests.helpers import parity
    from tests.helpers.models import load_dense, save_checkpoint

    work = tmp_path_factory.mktemp("values")
    for variant, changes in VARIANTS.items():
        folder = save_checkpoint(work / variant, variant, **changes)
        for tp_size in (1, 2):
            (work / f"{variant}.tp{tp_size}.json").write_text(compile_plan(folder, tp_size=tp_size).to_json())
        dense = load_dense(folder, torch.float64)
        of_model = forward(dense_values, ("all", "all", "all"))
        torch.save(parity.gradients(dense, of_model), work / f"{variant}.dense")
    return work


def errors(work: Path, variant: str, tp_size: int, ways: tuple[str, str, str]) -> float:
    import torch

    from tests.helpers import parity

    plan, model = load(work, variant, tp_size, loss_chunks=None)
    dense = torch.load(work / f"{variant}.dense")
    return max(parity.errors_against(dense, model, plan, forward(our_values, ways)).values())


def on_one_rank(work: Path) -> dict[str, float]:
    return {variant: errors(work, variant, 1, WAYS["deferred"]) for variant in VARIANTS}


def under_zero_3(work: Path) -> tuple[float, float]:
    """The largest difference of a gradient to that of ZeRO 0, and the gradient."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    from autotp_plan.runtime import deferred_logits, token_kl_divergences, token_log_probs
    from tests.helpers import parity
    from tests.helpers.models import batch

    gradients = []
    for stage in (0, 3):
        plan, model = load(work, "phi", 2, dtype=torch.float32, loss_chunks=None)
        engine, *_ = plan.initialize(model, config=parity.engine_settings(stage))
        for _ in range(2):  # the first step is where ZeRO 3 learns in which order layers come
            with deferred_logits(engine, 5):
                logits, other = (engine(input_ids=batch(seed), use_cache=False).logits for seed in (0, 1))
            loss = token_kl_divergences(logits, other).mean() - token_log_probs(logits[:, :-1], batch(0)[:, 1:]).mean()
            engine.backward(loss)
            gradients.append(safe_get_full_grad(model.get_parameter("lm_head.weight")).clone())
            engine.step()
    pairs = zip(gradients[:2], gradients[2:], strict=True)
    return max((one - other).abs().max().item() for one, other in pairs), gradients[0].abs().max().item()


def refusals(work: Path) -> dict[str, str]:
    import torch

    from autotp_plan.runtime import deferred_logits, logits_from_parts, token_kl_divergences, token_log_probs
    from tests.helpers.models import batch

    _, model = load(work, "phi", 2, loss_chunks=None)
    tokens = batch(0)
    with deferred_logits(model, 5):
        logits = model(input_ids=tokens).logits
    wrong = tokens.masked_fill(tokens == tokens[1, 3], -100)
    return {
        "shape": said(lambda: token_log_probs(logits, tokens[:, 1:])),
        "token": said(lambda: token_log_probs(logits, wrong)),
        "shapes": said(lambda: token_kl_divergences(logits, logits[:, 1:])),
        "part": said(lambda: logits_from_parts(model, torch.zeros(2, 12, 7))),
        "other": said(lambda: token_kl_divergences(logits, torch.zeros(2, 12, 256, dtype=torch.float64))),
    }


def in_two_ranks(work: Path) -> dict[str, Any]:
    import torch

    from autotp_plan.runtime import deferred_logits, token_log_probs
    from autotp_plan.runtime.losses import token_values
    from autotp_plan.runtime.losses.deferred_logits import DeferredLogits
    from tests.helpers.models import batch

    found: dict[str, Any] = {name: errors(work, "phi", 2, ways) for name, ways in WAYS.items()}
    found.update({variant: errors(work, variant, 2, WAYS["deferred"]) for variant in VARIANTS})
    _, model = load(work, "llama_bias_tied", 2, loss_chunks=None)
    model(input_ids=batch(0))

    class Values(torch.nn.Module):
        def forward(self, use_cache: bool) -> Any:
            with deferred_logits(model, 5):
                logits = model(input_ids=batch(0), use_cache=use_cache).logits
            self.loss = token_log_probs(logits, batch(1)).sum()
            return self

    forwards = vars(model).get("forward")
    found["widest"] = widest(Values())
    found["forward as before"] = vars(model)["forward"] is forwards
    del model.forward  # as of a model without a vocabulary-parallel loss
    with deferred_logits(model, 5):
        found["forward as before"] &= "forward" in vars(model)
    found["forward as before"] &= "forward" not in vars(model)
    model.forward = forwards
    with deferred_logits(model, 5):
        logits = model(input_ids=batch(0)).logits
    found["first"] = logits.shape == (2, 12, 257) and torch.equal(logits[:, 1:].argmax(-1), logits.argmax(-1)[:, 1:])
    found["refusals"] = refusals(work)
    found["ZeRO 3"] = under_zero_3(work)
    with planted(token_values, "copy_to_ranks", lambda input, group: input):
        found["planted: not all-reduced"] = errors(work, "phi", 2, WAYS["deferred"])
    with planted(DeferredLogits, "with_gradient", lambda self, weights: weights):
        found["planted: gradients of the reference"] = errors(work, "phi", 2, WAYS["deferred"])
    return found


@pytest.fixture(scope="module")
def two_ranks(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = launch(in_two_ranks, 2, work)[0]
    return found


@pytest.mark.parametrize("name", [*WAYS, *VARIANTS])
def test_values_and_every_gradient_equal_the_dense_models(two_ranks: dict[str, Any], name: str) -> None:
    assert two_ranks[name] < 1e-9


def test_they_do_on_one_rank(work: Path) -> None:
    found = launch(on_one_rank, 1, work)[0]
    assert max(found.values()) < 1e-9, found


def test_no_rank_holds_more_than_a_chunk(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["widest"] == FEATURES
    assert two_ranks["forward as before"]


def test_deferred_logits_are_logits(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["first"]


def test_gradients_under_zero_3(two_ranks: dict[str, Any]) -> None:
    difference, largest = two_ranks["ZeRO 3"]
    assert difference < 1e-6 < 1e-3 < largest


def test_planted_errors_are_noticed(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["planted: not all-reduced"] > 1e-4
    assert two_ranks["planted: gradients of the reference"] > 1e-4


def test_what_does_not_fit_is_refused(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["refusals"] == {
        "shape": "ValueError: Got tokens of (2, 11) for logits of (2, 12, 256).",
        "token": "RuntimeError: A token is not in the vocabulary. Expected: 0 to 255.",
        "shapes": "ValueError: Logits of (2, 12, 256) are compared with logits of (2, 11, 256).",
        "part": "ValueError: This rank has 128 words, and a part of 7 was given.",
        "other": "nothing was said",
    }
