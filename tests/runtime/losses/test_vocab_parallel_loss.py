"""The vocabulary-parallel loss: no rank holds full logits unless someone uses them.

Errors are planted in the same ranks.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.communication import WORDS, load, planted, prepare
from tests.helpers.launch import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers for it
]


def scaled(logits: Any) -> Any:
    return (logits.float() * 0.5 - 1).tanh().contiguous()


def set_in_place(logits: Any) -> Any:
    logits[..., 3:9] = -4.0
    return logits


def view_in_place(logits: Any) -> Any:
    logits[..., 130].mul_(0.25)
    return logits


def flipped(logits: Any) -> Any:
    return logits.flip(-1)


def normalised(logits: Any) -> Any:
    return logits.softmax(-1) * 9


def learned(logits: Any) -> Any:
    return logits * (SCALE[0] if SCALE else 1.0)


SCALE: list[Any] = []
"""A parameter of the test's, by which `learned` scales."""
BETWEEN = {"scaled": 0, "set_in_place": 1, "view_in_place": 1, "flipped": 1, "normalised": 1, "learned": 1}
"""What a model may do to its logits before the loss, and how often that gathers."""


def after_head(model: Any, function: Any) -> dict[str, Any]:
    """Loss and gradients, with `function` between head and loss."""
    import torch

    from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64
    from tests.helpers.models import batch

    tokens = batch(5)
    SCALE[:] = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True)]
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: function(logits))
    try:
        with PromoteToFloat64():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
    finally:
        handle.remove()
    numbers = {"loss": loss.detach(), "norm": model.model.norm.weight.grad.clone()}
    if function is learned:
        numbers["scale"] = SCALE[0].grad
    model.zero_grad()
    return numbers


def error(dense: dict[str, Any], found: dict[str, Any]) -> float:
    return max((dense[name] - found[name]).abs().max().item() for name in dense)


@contextlib.contextmanager
def gathers() -> Iterator[list[None]]:
    from autotp_plan.runtime.tensor_parallel import lazy_logits

    seen: list[None] = []
    real = lazy_logits.gather_last_dim  # type: ignore[attr-defined]

    def recording(*args: Any) -> Any:
        seen.append(None)
        return real(*args)

    with planted(lazy_logits, "gather_last_dim", recording):
        yield seen


def widest(model: Any, *, call: Any = None, **inputs: Any) -> int:
    """The largest last dimension of any tensor that a step makes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() and not tensor.is_meta:
                    self.seen = max(self.seen, tensor.shape[-1])
            return made

    with Widest() as mode:
        (call or model)(use_cache=False, **inputs).loss.backward()
    model.zero_grad()
    return mode.seen


def arguments() -> dict[str, dict[str, Any]]:
    """Ways to ask a causal LM for its loss."""
    import torch

    from tests.helpers.models import batch

    tokens = batch(3)
    masked = tokens.clone()
    masked[:, ::3] = -100
    return {
        "labels": {"labels": tokens},
        "some ignored": {"labels": masked},
        "items": {"labels": masked, "num_items_in_batch": torch.tensor(37)},
        "items, a number": {"labels": tokens, "num_items_in_batch": 10},
        "shifted": {"labels": tokens, "shift_labels": tokens.roll(2, dims=1)},
        "another index": {"labels": tokens, "ignore_index": int(tokens[0, 1])},
        "sliced": {"labels": tokens[:, -4:], "logits_to_keep": 4},
    }


def losses(model: Any) -> dict[str, Any]:
    """Loss and a gradient of each way."""
    from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64
    from tests.helpers.models import batch

    found = {}
    for name, inputs in arguments().items():
        with PromoteToFloat64():
            loss = model(input_ids=batch(3), use_cache=False, **inputs).loss
            loss.backward()
        found[f"{name}, loss"], found[f"{name}, gradient"] = loss.detach(), model.model.norm.weight.grad.clone()
        model.zero_grad()
    return found


def adapter_losses(model: Any, call: Any) -> dict[str, Any]:
    """Loss of each way, and the norms of two adapters' gradients, of a `call` of the PeftModel or of what it wraps."""
    import torch

    from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64
    from tests.helpers.models import batch

    found = {}
    for name, inputs in arguments().items():
        with PromoteToFloat64():
            loss = call(input_ids=batch(3), use_cache=False, **inputs).loss
            loss.backward()
        found[f"{name}, loss"] = loss.detach()
        for factor in ("q_proj.lora_A", "down_proj.lora_B"):  # which are replicated
            grads = [one.grad for key, one in model.named_parameters() if factor in key and one.grad is not None]
            found[f"{name}, {factor}"] = torch.stack(grads).clone()
        model.zero_grad()
    return found


def adapters(work: Path, dense: dict[str, Any]) -> dict[str, Any]:
    """Inside a rank: the losses of LoRA, whoever calls the model, as errors; and what is gathered for them."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from transformers.loss.loss_utils import ForCausalLMLoss

    from autotp_plan.runtime import deferred_logits
    from tests.helpers.models import batch

    found: dict[str, Any] = {}
    inputs = {"input_ids": batch(3), "labels": batch(3)}
    for chunks in (None, 5):
        plan, model = load(work, "llama_bias_tied", loss_chunks=chunks)
        adapted = plan.load_adapter(model, work / "adapter", is_trainable=True).train()
        for name, call in {"PeftModel": adapted, "forward": model.forward}.items():
            with gathers() as seen:
                errors = adapter_losses(adapted, call)
            key = f"{name} in chunks" if chunks else name
            found[key] = error(dense, errors), len(seen), widest(adapted, call=call, **inputs)
    with gathers() as seen, deferred_logits(adapted):
        found["deferred"] = adapted(**inputs).loss.item()
    found["deferred"] -= adapted(**inputs).loss.item()
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    others = model.forward
    with gathers() as seen:
        found["another's forward"] = error(dense, adapter_losses(adapted, adapted)), len(seen)
        calls: list[bool] = []

        def counting(**given: Any) -> Any:
            calls.append(True)
            return others(**given)

        model.forward = counting
        with deferred_logits(adapted):
            adapted(**inputs)
        found["called by deferred_logits"] = calls
    model.forward = others
    model.loss_function = ForCausalLMLoss
    with gathers() as seen, torch.no_grad():
        adapted(**inputs)
    found["of full logits"] = len(seen)
    return found


def refused(model: Any, **inputs: Any) -> str:
    from tests.helpers.models import batch

    try:
        model(input_ids=batch(3), use_cache=False, **inputs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


def vocabulary(work: Path) -> dict[str, Any]:
    """Inside a rank: losses, what is gathered when, what logits are; and the same with errors planted."""
    import copy
    import pickle

    import torch
    import torch.nn.functional as F

    from autotp_plan.runtime.losses import vocab_loss
    from autotp_plan.runtime.losses.vocab_loss import _CrossEntropy
    from autotp_plan.runtime.tensor_parallel import lazy_logits
    from autotp_plan.runtime.tensor_parallel.lazy_logits import LazilyGathered
    from tests.helpers.models import batch

    dense = torch.load(work / "losses")
    _, model = load(work, "llama_bias_tied")
    found: dict[str, Any] = {}
    with gathers() as seen:
        found["losses"] = {name: (dense[name] - value).abs().max().item() for name, value in losses(model).items()}
    found["gathered for losses"] = len(seen)
    _, in_chunks = load(work, "llama_bias_tied", loss_chunks=5)
    with gathers() as seen:
        found["in chunks"] = {
            name: (dense[name] - value).abs().max().item() for name, value in losses(in_chunks).items()
        }
    found["gathered in chunks"] = len(seen)
    words = in_chunks(input_ids=batch(3), labels=torch.full_like(batch(3), -100)).loss.item()
    found["nothing counts in chunks"] = words
    found["too few labels in chunks"] = refused(in_chunks, labels=batch(3), logits_to_keep=4)
    found["no such word in chunks"] = refused(in_chunks, labels=batch(3).masked_fill(batch(3) == batch(3)[1, 3], WORDS))
    found["after an error in chunks"] = in_chunks.lm_head.defer_product
    for function in (scaled, set_in_place, view_in_place, flipped, normalised, learned):
        name = function.__name__
        with gathers() as seen:
            found[name] = error(dense[name], after_head(model, function)), len(seen)
    tokens = batch(3)
    found["nothing counts"] = model(input_ids=tokens, labels=torch.full_like(tokens, -100)).loss.item()
    found["too few labels"] = refused(model, labels=tokens, logits_to_keep=4)
    found["no such word"] = refused(model, labels=tokens.masked_fill(tokens == tokens[1, 3], WORDS))
    found["after an error"] = model.lm_head.defer_gather

    reference = model.eval()(input_ids=tokens).logits
    asked = {
        "evaluation": model(input_ids=tokens, labels=tokens),
        "no labels": model.train()(input_ids=tokens),
        "training": model(input_ids=tokens, labels=tokens),
    }
    found["types"] = {name: type(out.logits) is torch.Tensor for name, out in asked.items()}
    found["whole"] = {name: torch.equal(out.logits.detach(), reference) for name, out in asked.items()}
    found["evaluation loss"] = (asked["evaluation"].loss - asked["training"].loss).abs().item()
    ours, model.loss_function = model.loss_function, lambda logits, labels, vocab_size, **_: logits.sum()
    found["types"]["another's loss"] = type(model(input_ids=tokens, labels=tokens).logits) is torch.Tensor
    model.loss_function = ours
    positional = model(tokens, None, None, None, None, tokens)
    found["positional"] = type(positional.logits) is LazilyGathered
    lazy = model(input_ids=tokens, labels=tokens).logits
    with gathers() as seen:
        found["about"] = (
            tuple(lazy.shape), lazy.size(-1), lazy.numel(), lazy.dim(), len(lazy.shape), lazy.dtype, lazy.requires_grad,
            repr(lazy), f"{lazy}", type(lazy.float().detach()) is LazilyGathered, isinstance(lazy, torch.Tensor),
        )  # fmt: skip
        found["gathered to be told about"] = len(seen)
        with torch.no_grad():
            found["uses"] = {
                "argmax": torch.equal(lazy.argmax(-1), reference.argmax(-1)),
                "slice": torch.equal(lazy[..., :-1, :], reference[..., :-1, :]),
                "in a list": torch.equal(torch.cat([lazy, lazy]), torch.cat([reference, reference])),
                "pickle": torch.equal(pickle.loads(pickle.dumps(lazy.detach())), reference),
                "second operand": torch.equal(reference - lazy, torch.zeros_like(reference)),
                "numpy": bool((lazy.detach().numpy() == reference.detach().numpy()).all()),
            }
        F.cross_entropy(lazy.view(-1, WORDS), tokens.view(-1)).backward()
    found["gathered to be used"] = len(seen)
    norm = model.model.norm.weight
    mine, norm.grad = norm.grad, None
    F.cross_entropy(model(input_ids=tokens).logits.view(-1, WORDS), tokens.view(-1)).backward()
    found["own loss"] = (mine - norm.grad).abs().max().item()
    model.zero_grad()

    inputs = {"input_ids": tokens, "labels": tokens}
    found["widest"] = widest(model, **inputs)
    found["called by forward"] = widest(model, call=model.forward, **inputs)
    found["copied model"] = widest(copy.deepcopy(model), **inputs)
    _, without = load(work, "llama_bias_tied", False)
    found["widest, off"] = widest(without, **inputs)

    def worst(name: str | None = None) -> float:
        found = {key: (dense[key] - value).abs().max().item() for key, value in losses(model).items()}
        return max(found.values()) if name is None else found[name]

    right = _CrossEntropy.backward

    def one_hot_of_everyone(ctx: Any, gradient: Any) -> Any:
        softmax, column, _, counted = ctx.saved_tensors
        return right(_Saved(softmax, column, counted, counted), gradient)

    class _Saved:
        def __init__(self, *saved: Any) -> None:
            self.saved_tensors = saved

    with planted(_CrossEntropy, "backward", staticmethod(one_hot_of_everyone)):
        found["one-hot of everyone"] = worst()
    with planted(vocab_loss, "find_held", lambda ids, held: (ids.clamp(0, 100), ids >= 0)):
        found["another's target"] = worst("labels, loss")
    with planted(lazy_logits, "_ELEMENTWISE", lazy_logits._ELEMENTWISE | {torch.Tensor.flip}):
        found["flipped on each rank"] = error(dense["flipped"], after_head(model, flipped))
    with planted(lazy_logits, "_are_numbers", lambda others: True):
        found["learned on each rank"] = error(dense["learned"], after_head(model, learned))
    found["adapters"] = adapters(work, torch.load(work / "losses of the adapter"))
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("loss")
    prepare(work, "llama_bias_tied", vocab_size=WORDS)
    return work


@pytest.fixture(scope="module")
def vocabularies(work: Path) -> dict[str, Any]:
    import torch
    from peft import get_peft_model

    from tests.helpers.models import load_dense
    from tests.runtime.integrations.test_lora import lora_config, randomise_adapter

    dense: Any = load_dense(work / "llama_bias_tied", torch.float64)
    numbers: dict[str, Any] = losses(dense)
    for function in (scaled, set_in_place, view_in_place, flipped, normalised, learned):
        numbers[function.__name__] = after_head(dense, function)
    torch.save(numbers, work / "losses")
    torch.manual_seed(0)
    adapted = get_peft_model(load_dense(work / "llama_bias_tied", torch.float64), lora_config()).train()
    randomise_adapter(adapted)
    adapted.save_pretrained(str(work / "adapter"), save_embedding_layers=False)
    torch.save(adapter_losses(adapted, adapted), work / "losses of the adapter")
    one, other = launch(vocabulary, 2, work, timeout=200)
    assert one["losses"].keys() == other["losses"].keys()
    return one


def test_losses_are_the_dense_models_and_gather_no_logits(vocabularies: dict[str, Any]) -> None:
    assert len(vocabularies["losses"]) == 14
    assert all(error < 1e-12 for error in vocabularies["losses"].values()), vocabularies["losses"]
    assert vocabularies["gathered for losses"] == 0
    assert vocabularies["nothing counts"] != vocabularies["nothing counts"], "the mean of nothing, as transformers' is"


def test_losses_in_chunks_are_the_dense_models(vocabularies: dict[str, Any]) -> None:
    assert vocabularies["in chunks"].keys() == vocabularies["losses"].keys()
    assert all(error < 1e-12 for error in vocabularies["in chunks"].values()), vocabularies["in chunks"]
    assert vocabularies["gathered in chunks"] == 0
    assert vocabularies["nothing counts in chunks"] != vocabularies["nothing counts in chunks"]
    for name in ("too few labels", "no such word"):
        assert vocabularies[f"{name} in chunks"] == vocabularies[name]
    assert vocabularies["after an error in chunks"] is None


@pytest.mark.parametrize("name", BETWEEN)
def test_logits_may_be_changed_before_the_loss(vocabularies: dict[str, Any], name: str) -> None:
    assert vocabularies[name][0] < 1e-12
    assert vocabularies[name][1] == BETWEEN[name]


def test_labels_that_do_not_fit_are_refused(vocabularies: dict[str, Any]) -> None:
    assert (
        "ValueError: The labels do not belong to the logits. Got: 24 labels for the logits of 8 tokens"
        in (vocabularies["too few labels"])
    )
    assert f"RuntimeError: A label is not in the vocabulary. Expected: 0 to {WORDS - 1}" in vocabularies["no such word"]
    assert vocabularies["after an error"] is False


def test_logits_look_like_full_tensors_and_are_gathered_at_first_use(vocabularies: dict[str, Any]) -> None:
    assert vocabularies["types"] == {
        "evaluation": True, "no labels": True, "training": False, "another's loss": True,
    }  # fmt: skip
    assert set(vocabularies["whole"].values()) == {True}
    assert vocabularies["evaluation loss"] < 1e-6, "one in float32"
    assert vocabularies["positional"]
    shape, last, numel, dim, length, dtype, requires_grad, shown, formatted, stays, is_tensor = vocabularies["about"]
    assert (shape, last, numel, dim, length) == ((2, 12, WORDS), WORDS, 24 * WORDS, 3, 3)
    assert str(dtype) == "torch.float64" and requires_grad and stays and is_tensor
    assert shown == formatted == "LazilyGathered(shape=[2, 12, 257], of which this rank has 129 of the last dimension)"
    assert vocabularies["gathered to be told about"] == 0
    assert set(vocabularies["uses"].values()) == {True}, vocabularies["uses"]
    assert vocabularies["gathered to be used"] == 1, "from then on it is whole"
    assert vocabularies["own loss"] < 1e-12


def test_no_rank_holds_full_logits(vocabularies: dict[str, Any]) -> None:
    seen = {vocabularies[name] for name in ("widest", "copied model", "called by forward")}
    assert seen == {129}, "half of the words, rounded up"
    assert vocabularies["widest, off"] == WORDS


def test_the_loss_of_an_adapter_gathers_no_logits_whoever_calls_the_model(vocabularies: dict[str, Any]) -> None:
    found = vocabularies["adapters"]
    for name in ("PeftModel", "forward"):
        assert found[name][0] < 1e-12 and found[name][1:] == (0, 129), found[name]
        assert found[f"{name} in chunks"][0] < 1e-12, found[f"{name} in chunks"]
        assert found[f"{name} in chunks"][1] == 0 and found[f"{name} in chunks"][2] < 129
    assert found["another's forward"][0] < 1e-12 and found["another's forward"][1] == 0
    assert abs(found["deferred"]) < 1e-6 and found["called by deferred_logits"] == [True]
    assert found["of full logits"] == 1, "a loss that is not ours"


def test_errors_planted_in_the_loss_are_noticed(vocabularies: dict[str, Any]) -> None:
    for name in ("one-hot of everyone", "another's target", "flipped on each rank", "learned on each rank"):
        assert vocabularies[name] > 1e-3, f"{name} went unnoticed"
