"""Resizing, replacing and tying embeddings of a sharded model, and token ids that are not in the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.helpers.models import batch, load_dense, save_checkpoint

VARIANTS = ("llama_bias_tied", "llama", "gemma2", "opt_350m", "gpt2")
VOCABULARY = 256
SAME_SIZE: tuple[dict[str, Any], ...] = (
    {"new_num_tokens": VOCABULARY}, {"new_num_tokens": VOCABULARY, "mean_resizing": False}, {},
    {"pad_to_multiple_of": 64}, {"new_num_tokens": 250, "pad_to_multiple_of": 64},
)  # fmt: skip
OTHER_SIZES: tuple[dict[str, Any], ...] = (
    {"new_num_tokens": 260}, {"new_num_tokens": 200}, {"new_num_tokens": 257, "pad_to_multiple_of": 8},
    {"pad_to_multiple_of": 100},
)  # fmt: skip
NEW_SIZE = 260


def loss_of(model: Any, token: int | None = None, label: int | None = None) -> float:
    """The loss of a batch, of which one token or one label may be another."""
    tokens = batch(3)
    labels = tokens.clone()
    if token is not None:
        tokens[0, 3] = token
    if label is not None:
        labels[0, 3] = label
    return float(model.train()(input_ids=tokens, labels=labels, use_cache=False).loss.detach())


def resized(folder: Path, variant: str) -> Path:
    """A checkpoint with a larger vocabulary, made as the refusal says."""
    import torch

    model = load_dense(folder / variant)
    torch.manual_seed(0)
    model.resize_token_embeddings(NEW_SIZE)  # type: ignore[operator]
    model.save_pretrained(folder / f"{variant}.resized")  # type: ignore[operator]
    return folder / f"{variant}.resized"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan

    work = tmp_path_factory.mktemp("vocabulary")
    for variant in VARIANTS:
        save_checkpoint(work / variant, variant)
        for folder in (work / variant, resized(work, variant)):
            (work / f"{folder.name}.json").write_text(compile_plan(folder, tp_size=2).to_json())
    return work


def said(errors: type[Exception], call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a call returns, or the error that it raises, in words."""
    try:
        return call(*args, **options)
    except errors as error:
        return f"{type(error).__name__}: {error}"


def calls(work: Path) -> dict[str, dict[str, Any]]:
    """Inside a rank: by variant what the calls give."""
    return {variant: calls_on(work, variant) for variant in VARIANTS}


def calls_on(work: Path, variant: str) -> dict[str, Any]:
    from torch import nn
    from transformers import PreTrainedModel

    from autotp_plan.runtime import load_plan
    from autotp_plan.schemas.errors import MismatchError

    plan = load_plan(work / f"{variant}.json")
    model: Any = plan.load_model(work / variant)
    before = [id(parameter) for parameter in model.parameters()]
    model.set_input_embeddings(model.get_input_embeddings())
    model.set_output_embeddings(model.get_output_embeddings())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    resize, ids = model.resize_token_embeddings, (VOCABULARY, 10**6, -1, -VOCABULARY, 2**40)
    found = {
        "same": [resize(**size) is model.get_input_embeddings() for size in SAME_SIZE],
        "refused": [said(MismatchError, resize, **size) for size in OTHER_SIZES],
        "inputs": said(MismatchError, model.set_input_embeddings, nn.Embedding(VOCABULARY, 64)),
        "outputs": said(MismatchError, model.set_output_embeddings, None),
        "ids": {token: said(IndexError, loss_of, model, token=token) for token in ids},
        "labels": [said(RuntimeError, loss_of, model, label=label) for label in (VOCABULARY, -1)],
        "unchanged": before == [id(parameter) for parameter in model.parameters()],
        "vocab_size": model.config.vocab_size,
        "loss": loss_of(model),
        "resized": loss_of(load_plan(work / f"{variant}.resized.json").load_model(work / f"{variant}.resized")),
    }
    model.get_input_embeddings().num_embeddings = 2**50  # planted: every id seems to be in the vocabulary
    found["planted id"] = said(IndexError, loss_of, model, token=VOCABULARY)
    if variant == "llama_bias_tied":  # planted: transformers' own method, on a layer that shows the rows of one rank
        model = plan.load_model(work / variant)
        type(model.get_input_embeddings()).gathers_when_read = False
        PreTrainedModel.resize_token_embeddings(model, VOCABULARY)
        found["planted size"] = loss_of(model)
    return found


@pytest.fixture(scope="module")
def found(work: Path) -> dict[str, dict[str, Any]]:
    ranks = launch(calls, 2, work)
    assert repr(ranks[0]) == repr(ranks[1]), "every rank gives and says the same"
    return ranks[0]


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_call_that_changes_nothing_changes_nothing(work: Path, found: Any, variant: str) -> None:
    calls = found[variant]
    assert all(calls["same"]) and calls["unchanged"] and calls["vocab_size"] == VOCABULARY
    assert calls["loss"] == pytest.approx(loss_of(load_dense(work / variant)), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_size_is_refused_and_resizing_before_compile_works(work: Path, found: Any, variant: str) -> None:
    for message, wanted in zip(found[variant]["refused"], (260, 200, 264, 300), strict=True):
        assert "MismatchError: the vocabulary of a sharded model cannot be resized" in message
        assert f"got:      {wanted} tokens" in message and f"expected: {VOCABULARY} tokens" in message
        assert (
            f"resize before compile: AutoModelForCausalLM.from_pretrained(path), resize_token_embeddings({wanted})"
            in message
        )
        assert ("need only be large enough" in message) == (wanted == 200)
    assert found[variant]["resized"] == pytest.approx(loss_of(load_dense(work / f"{variant}.resized")), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_embeddings_are_refused(found: Any, variant: str) -> None:
    inputs, outputs = found[variant]["inputs"], found[variant]["outputs"]
    assert "where:    model.set_input_embeddings\n  got:      Embedding\n" in inputs
    assert "where:    model.set_output_embeddings\n  got:      NoneType\n" in outputs
    assert "replace them before compile" in inputs and "replace them before compile" in outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_ids_and_labels_outside_the_vocabulary_are_errors(work: Path, found: Any, variant: str) -> None:
    dense = load_dense(work / variant)
    for token, said in found[variant]["ids"].items():
        with pytest.raises(IndexError) as caught:
            loss_of(dense, token=token)
        assert said == f"IndexError: {caught.value}", token
    for said in found[variant]["labels"]:
        assert said.startswith("RuntimeError: A label is not in the vocabulary. Expected: 0 to 255, or -100 to ignore.")


def test_planted_errors_are_found(found: Any) -> None:
    """What transformers' own method does to a shard, and a lookup that does not know the vocabulary's size."""
    calls = found["llama_bias_tied"]
    assert calls["planted size"] != pytest.approx(calls["loss"], rel=1e-3)
    assert isinstance(calls["planted id"], float)
