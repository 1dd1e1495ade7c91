"""Layers that take one input add its gradients before one all-reduce: as many all-reduces as promised, same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.communication import SWITCHES, WORDS, all_reduces, load, prepare
from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def count(model: Any, **inputs: Any) -> dict[str, int]:
    """How many activations are all-reduced in one forward and one backward."""
    from tests.helpers.models import batch

    tokens = batch(1)
    whole = (*tokens.shape, model.config.hidden_size)
    with all_reduces() as shapes:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, **inputs).loss
        forward = shapes.count(whole)
        loss.backward()
    model.zero_grad()
    return {"forward": forward, "backward": shapes.count(whole) - forward}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama_bias_tied": {"vocab_size": WORDS}, "opt_350m": {}, "gemma2": {}, "cohere": {}, "granite": {},
    "qwen2_moe": {"output_router_logits": True, "router_aux_loss_coef": 0.5}, "deepseek_v3": {}, "gpt2": {}, "phi3": {},
}  # fmt: skip
COUNTED = ("llama", "opt_350m", "cohere", "qwen2_moe")
CHECKPOINTED = {"plain": None, "reentrant": True, "not reentrant": False}


def shared_gradients(work: Path) -> dict[str, Any]:
    """Inside a rank: counts and errors of every variant, switched on and off, with recomputed activations and without;
    counts under DeepSpeed.
    """
    import torch
    from deepspeed.module_inject.layers import TensorParallel_Layer

    from tests.helpers import parity

    found: dict[str, Any] = {}
    for variant in VARIANTS:
        dense = torch.load(work / f"{variant}.dense")
        numbers = {}
        for switch, on in SWITCHES.items():
            plan, model = load(work, variant, on)
            for way, reentrant in CHECKPOINTED.items():
                if reentrant is not None:
                    if variant not in COUNTED:
                        continue
                    options = {"use_reentrant": reentrant}
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
                model.zero_grad()
                if variant in COUNTED:
                    found[f"{variant}, {switch}, {way}: count"] = count(model)
                # autograd recomputes outside of float64's mode
                numbers[switch, way] = parity.sharded_gradients(
                    model, list(dense["gradient"]), promote=reentrant is None
                )
        found[f"{variant}: dense"] = max(parity.errors(dense, numbers["on", "plain"], plan).values())
        for way, key in (("plain", "off"), ("reentrant", "reentrant"), ("not reentrant", "not reentrant")):
            if ("on", way) in numbers:
                errors = parity.differences(numbers["off", way], numbers["on", way], plan)
                found[f"{variant}: {key}"] = max(errors.values())
    for stage in (0, 3):
        plan, model = load(work, "llama", dtype=torch.float32)
        engine, *_ = plan.initialize(model, config=parity.engine_settings(stage))
        found[f"zero {stage}: count"] = engine_count(engine)
        engine.destroy()
    _, model = load(work, "llama")
    TensorParallel_Layer.tp_overlap_comm = True
    found["overlap: count"] = count(model)
    TensorParallel_Layer.tp_overlap_comm = False
    return found


def engine_count(engine: Any) -> dict[str, int]:
    from tests.helpers.models import batch

    tokens = batch(1)
    with all_reduces() as shapes:
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        forward = shapes.count((2, 12, 64))
        engine.backward(loss)
    engine.step()
    return {"forward": forward, "backward": shapes.count((2, 12, 64)) - forward}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("communication")
    for variant, changes in VARIANTS.items():
        prepare(work, variant, **changes)
    return work


@pytest.fixture(scope="module")
def gradients(work: Path) -> dict[str, Any]:
    return launch(shared_gradients, 2, work, timeout=280)[0]


def test_layers_that_take_one_input_all_reduce_its_gradient_once(gradients: dict[str, Any]) -> None:
    """Of two layers, and one for the embedding forward and one for the head backward."""
    assert gradients["llama, on, plain: count"] == {"forward": 2 * 2 + 1, "backward": 2 * 2 + 1}
    assert gradients["llama, off, plain: count"] == {"forward": 2 * 2 + 1, "backward": 2 * 5 + 1}
    assert gradients["cohere, on, plain: count"]["backward"] == 2 * 1 + 1, "attention and MLP take one tensor"
    assert gradients["overlap: count"] == gradients["llama, off, plain: count"], "each sums its own, meanwhile"
    for stage in (0, 3):
        assert gradients[f"zero {stage}: count"] == gradients["llama, on, plain: count"], f"ZeRO {stage}"


def test_recomputed_activations_repeat_only_all_reduces_of_the_forward(gradients: dict[str, Any]) -> None:
    for variant in COUNTED:
        plain = gradients[f"{variant}, on, plain: count"]
        for way in ("reentrant", "not reentrant"):
            counted = gradients[f"{variant}, on, {way}: count"]
            assert counted["forward"] == plain["forward"]
            recomputed = counted["backward"] - plain["backward"]
            assert 0 < recomputed <= plain["forward"], f"{variant}, {way}: only sums of the forward, once more"


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_the_dense_model_and_of_separate_all_reduces(
    gradients: dict[str, Any], variant: str
) -> None:
    assert gradients[f"{variant}: off"] < 1e-12
    assert gradients[f"{variant}: dense"] < 1e-9


@pytest.mark.parametrize("variant", COUNTED)
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_gradients_of_recomputed_activations_are_those_of_separate_all_reduces(
    gradients: dict[str, Any], variant: str, way: str
) -> None:
    assert gradients[f"{variant}: {way}"] < 1e-5, "float32 inside norms, where autograd recomputes"
