"""Less communication, less memory: gradients that meet before they are summed, and a loss without whole logits.

Each test of one kind shares a launch of two ranks; what must be caught is planted in the same ranks.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SWITCHES = {"on": True, "off": False}
WORDS = 257
"""The vocabulary: a size that no other dimension has, and that two ranks cannot halve."""


def prepare(work: Path, variant: str, **changes: Any) -> None:
    """`variant/`, `variant.json` at TP=2, and the dense model's numbers in `variant.dense`."""
    import torch

    from autotp_plan.planner import compile_plan
    from tests.helpers import parity
    from tests.helpers.models import eager_experts, load_dense, save_checkpoint

    folder = save_checkpoint(work / variant, variant, **changes)
    (work / f"{variant}.json").write_text(compile_plan(folder, tp_size=2).to_json())
    dense = load_dense(folder, torch.float64, **eager_experts(torch.float64))
    torch.save(parity.gradients(dense), work / f"{variant}.dense")


def load(work: Path, variant: str, on: bool = True, **options: Any) -> Any:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import eager_experts

    options = {"dtype": torch.float64, **eager_experts(torch.float64), **options}
    plan = load_plan(work / f"{variant}.json")
    return plan, plan.load_model(
        work / variant, share_input_gradients=on, vocab_parallel_loss=on, **options
    ).train()  # fmt: skip


@contextlib.contextmanager
def all_reduces() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what is all-reduced meanwhile."""
    from deepspeed import comm as dist

    shapes: list[tuple[int, ...]] = []
    real = dist.all_reduce

    def recording(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = recording
    try:
        yield shapes
    finally:
        dist.all_reduce = real


@contextlib.contextmanager
def planted(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    right = owner.__dict__[name]
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)


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


# --- gradients that meet before they are summed ---


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


def test_all_reduces_of_a_layer(gradients: dict[str, Any]) -> None:
    """Of two layers, and one for the embedding forward and one for the head backward."""
    assert gradients["llama, on, plain: count"] == {"forward": 2 * 2 + 1, "backward": 2 * 2 + 1}
    assert gradients["llama, off, plain: count"] == {"forward": 2 * 2 + 1, "backward": 2 * 5 + 1}
    assert gradients["cohere, on, plain: count"]["backward"] == 2 * 1 + 1, "attention and MLP take one tensor"
    assert gradients["overlap: count"] == gradients["llama, off, plain: count"], "each sums its own, meanwhile"
    for stage in (0, 3):
        assert gradients[f"zero {stage}: count"] == gradients["llama, on, plain: count"], f"ZeRO {stage}"


def test_all_reduces_with_recomputed_activations(gradients: dict[str, Any]) -> None:
    for variant in COUNTED:
        plain = gradients[f"{variant}, on, plain: count"]
        for way in ("reentrant", "not reentrant"):
            counted = gradients[f"{variant}, on, {way}: count"]
            assert counted["forward"] == plain["forward"]
            recomputed = counted["backward"] - plain["backward"]
            assert 0 < recomputed <= plain["forward"], f"{variant}, {way}: only sums of the forward, once more"


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_loss_and_gradients(gradients: dict[str, Any], variant: str) -> None:
    assert gradients[f"{variant}: off"] < 1e-12
    assert gradients[f"{variant}: dense"] < 1e-9


@pytest.mark.parametrize("variant", COUNTED)
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_same_gradients_from_recomputed_activations(gradients: dict[str, Any], variant: str, way: str) -> None:
    assert gradients[f"{variant}: {way}"] < 1e-5, "float32 inside norms, where autograd recomputes"


# --- what may share, and for how long ---


def users(function: Callable[[Any, Any, Any], Any], *, leaf: bool = False) -> tuple[int, Any]:
    """The number of sums and the gradient of `x` after `function(copy, x, w)`, where each rank has its own `w`."""
    import torch
    from deepspeed.utils import groups

    from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks

    group = groups.get_tensor_model_parallel_group()
    start = torch.arange(6.0, dtype=torch.float64).view(2, 3).requires_grad_()
    x = start.detach().requires_grad_() if leaf else start * 2
    w = torch.full((3,), 1.0 + groups.get_tensor_model_parallel_rank(), dtype=torch.float64)
    with all_reduces() as shapes:
        function(lambda tensor: copy_to_ranks(tensor, group, shared=True), x, w).sum().backward()
    return len(shapes), (x if leaf else start).grad


def two(copy: Any, x: Any, w: Any) -> Any:
    return copy(x) * w + copy(x) * w


def changed(copy: Any, x: Any, w: Any) -> Any:
    first = copy(x) * w
    x.mul_(3)
    return first + copy(x) * w


def two_tensors(copy: Any, x: Any, w: Any) -> Any:
    return copy(x) * w + copy(x + 0) * w


def two_threads(copy: Any, x: Any, w: Any) -> Any:
    import threading

    parts = [copy(x) * w]
    thread = threading.Thread(target=lambda: parts.append(copy(x) * w))
    thread.start()
    thread.join()
    return parts[0] + parts[1]


def without_gradient_first(copy: Any, x: Any, w: Any) -> Any:
    import torch

    with torch.no_grad():
        copy(x)
        first = copy(x.detach())
    assert not first.requires_grad
    return copy(x) * w + copy(x) * w


def in_another_graph(copy: Any, x: Any, w: Any) -> Any:
    (copy(x) * w).sum().backward(retain_graph=True)
    return copy(x) * w


def weight_without_gradient(copy: Any, x: Any, w: Any) -> Any:
    import torch.nn.functional as F

    return F.linear(copy(x), w.expand(3, 3)) + F.linear(copy(x), w.expand(3, 3))


def changed_copy(copy: Any, x: Any, w: Any) -> Any:
    return copy(x).mul_(2) * w


def sharing(work: Path) -> dict[str, Any]:
    """Inside a rank: what shares; what is left of it; what a shared copy that ignores changes would do."""
    import torch

    from autotp_plan.runtime.tensor_parallel import collectives
    from tests.helpers.models import batch

    _, model = load(work, "llama")
    cases = (
        two, changed, two_tensors, two_threads, without_gradient_first, in_another_graph, weight_without_gradient,
    )  # fmt: skip
    found: dict[str, Any] = {case.__name__: users(case) for case in cases}
    found["leaf"] = users(two, leaf=True)
    try:
        users(changed_copy)
        found["changed_copy"] = "nothing was said"
    except RuntimeError as error:
        found["changed_copy"] = str(error)

    def careless(input: Any, group: Any) -> Any:
        known = collectives._shared_sums.by_input.get(input)
        meeting = known[2]() if known else None
        if meeting is None:
            return right(input, group)
        return meeting

    right = collectives._shared_sum
    with planted(collectives, "_shared_sum", careless):
        found["changed, carelessly"] = users(changed)
    with planted(collectives._SumOfGradients, "backward", staticmethod(lambda ctx, gradient: (gradient, None))):
        found["two, not summed"] = users(two)

    def step() -> tuple[int, int]:
        out = model(input_ids=batch(1), labels=batch(1), use_cache=False)
        out.loss.backward()
        del out
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects()), len(collectives._shared_sums.by_input)

    def steps() -> list[tuple[int, int]]:
        gc.collect()
        gc.disable()
        gc.freeze()  # so that `step` counts only what was made since
        try:
            return [step() for _ in range(20)]
        finally:
            gc.enable()

    found["steps"] = steps()
    kept: list[Any] = []
    meeting = collectives._gradient_sum

    def keeping(input: Any, group: Any) -> Any:
        kept.append(input)
        return meeting(input, group)

    with planted(collectives, "_gradient_sum", keeping):
        found["steps that keep"] = steps()
    with torch.no_grad():
        before = len(collectives._shared_sums.by_input)
        model(input_ids=batch(1), labels=batch(1), use_cache=False)
        found["evaluated"] = len(collectives._shared_sums.by_input) - before
    return found


@pytest.fixture(scope="module")
def shares(work: Path) -> dict[str, Any]:
    return launch(sharing, 2, work, timeout=120)[0]


@pytest.mark.parametrize(
    ("case", "sums", "gradient"),
    [
        ("two", 1, 12.0),  # 2 (of x) * 2 (users) * (1 + 2, of w)
        ("leaf", 1, 6.0),
        ("weight_without_gradient", 1, 36.0),
        ("without_gradient_first", 1, 12.0),
        ("two_tensors", 2, 12.0),
        ("two_threads", 2, 12.0),
        ("changed", 2, 24.0),  # 6 + 18
        ("in_another_graph", 2, 12.0),
    ],
)
def test_what_shares_a_sum(shares: dict[str, Any], case: str, sums: int, gradient: float) -> None:
    counted, found = shares[case]
    assert counted == sums
    assert (found == gradient).all(), found


def test_a_copy_that_is_changed_in_place_is_refused(shares: dict[str, Any]) -> None:
    assert "is a view and is being modified inplace" in shares["changed_copy"]


def test_planted_errors_of_sharing(shares: dict[str, Any]) -> None:
    assert (shares["changed, carelessly"][1] != 24.0).any()
    assert (shares["two, not summed"][1] != 12.0).any()


def test_nothing_is_left_of_a_step(shares: dict[str, Any]) -> None:
    """Without the garbage collector: what only it would free counts as left.

    A thread of gloo's may hold what it has just sent for a moment longer, so the fewest count.
    """
    tensors = [found for found, _ in shares["steps"]]
    assert min(tensors[10:]) <= min(tensors[1:10]), "as many tensors after the last steps as after the first"
    assert {meetings for _, meetings in shares["steps"]} == {0}
    assert shares["evaluated"] == 0
    kept = [found for found, _ in shares["steps that keep"]]
    assert min(kept[10:]) > max(kept[1:10]), "one that keeps its inputs shows"


# --- a loss without whole logits ---


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


def widest(model: Any, **inputs: Any) -> int:
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
        model(use_cache=False, **inputs).loss.backward()
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

    from autotp_plan.runtime.tensor_parallel import lazy_logits, vocab_loss
    from autotp_plan.runtime.tensor_parallel.lazy_logits import LazilyGathered
    from autotp_plan.runtime.tensor_parallel.vocab_loss import _CrossEntropy
    from tests.helpers.models import batch

    dense = torch.load(work / "losses")
    _, model = load(work, "llama_bias_tied")
    found: dict[str, Any] = {}
    with gathers() as seen:
        found["losses"] = {name: (dense[name] - value).abs().max().item() for name, value in losses(model).items()}
    found["gathered for losses"] = len(seen)
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
    return found


@pytest.fixture(scope="module")
def vocabularies(work: Path) -> dict[str, Any]:
    import torch

    from tests.helpers.models import load_dense

    dense: Any = load_dense(work / "llama_bias_tied", torch.float64)
    numbers: dict[str, Any] = losses(dense)
    for function in (scaled, set_in_place, view_in_place, flipped, normalised, learned):
        numbers[function.__name__] = after_head(dense, function)
    torch.save(numbers, work / "losses")
    one, other = launch(vocabulary, 2, work, timeout=200)
    assert one["losses"].keys() == other["losses"].keys()
    return one


def test_losses(vocabularies: dict[str, Any]) -> None:
    assert len(vocabularies["losses"]) == 14
    assert all(error < 1e-12 for error in vocabularies["losses"].values()), vocabularies["losses"]
    assert vocabularies["gathered for losses"] == 0
    assert vocabularies["nothing counts"] != vocabularies["nothing counts"], "the mean of nothing, as transformers' is"


@pytest.mark.parametrize("name", BETWEEN)
def test_what_a_model_does_to_its_logits(vocabularies: dict[str, Any], name: str) -> None:
    assert vocabularies[name][0] < 1e-12
    assert vocabularies[name][1] == BETWEEN[name]


def test_labels_that_do_not_fit(vocabularies: dict[str, Any]) -> None:
    assert (
        "ValueError: The labels do not belong to the logits. Got: 24 labels for the logits of 8 tokens"
        in (vocabularies["too few labels"])
    )
    assert f"RuntimeError: A label is not in the vocabulary. Expected: 0 to {WORDS - 1}" in vocabularies["no such word"]
    assert vocabularies["after an error"] is False


def test_what_logits_are(vocabularies: dict[str, Any]) -> None:
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


def test_no_rank_makes_whole_logits(vocabularies: dict[str, Any]) -> None:
    assert vocabularies["widest"] == vocabularies["copied model"] == 129, "half of the words, rounded up"
    assert vocabularies["widest, off"] == WORDS


def test_planted_errors_of_the_loss(vocabularies: dict[str, Any]) -> None:
    for name in ("one-hot of everyone", "another's target", "flipped on each rank", "learned on each rank"):
        assert vocabularies[name] > 1e-3, f"{name} went unnoticed"


# --- what is not done for nothing ---


def for_nothing(work: Path, tp_size: int) -> dict[str, Any]:
    """Inside a rank: three steps without ZeRO, each of two accumulated passes, with what is saved and without."""
    from autotp_plan.runtime import load_plan
    from tests.helpers.models import batch

    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }  # fmt: skip
    found: dict[str, Any] = {}
    for switch, on in SWITCHES.items():
        plan = load_plan(work / f"shards{tp_size}" / "autotp_plan.json")
        model = plan.load_model(work / f"shards{tp_size}", map_shards=on)
        found["untrained"] = model.get_parameter("model.norm.weight").detach().clone()
        engine, *_ = plan.initialize(model, config=config, skip_lone_sums=on)
        sums: list[int] = []
        real = engine.allreduce_bucket

        def counting(bucket: Any, *args: Any, real: Any = real, sums: list[int] = sums) -> Any:
            sums.append(len(bucket))
            return real(bucket, *args)

        engine.allreduce_bucket = counting
        for step in range(6):
            tokens = batch(step)[plan.ranks.dp_rank :: 2] if tp_size == 1 else batch(step)
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()
        assert engine.global_steps == 3
        found[switch] = {
            "weights": {name: tensor.detach().clone() for name, tensor in model.named_parameters()},
            "sums": len(sums),
        }
        engine.destroy()
    return found


def test_what_is_done_for_nothing_changes_nothing(tmp_path: Path) -> None:
    import torch

    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "llama", "llama")
    for tp_size in (1, 2):
        presplit(compile_plan(folder, tp_size=tp_size), folder, tmp_path / f"shards{tp_size}")
    for found in launch(for_nothing, 2, tmp_path, 2):
        on, off = found["on"]["weights"], found["off"]["weights"]
        assert on.keys() == off.keys() and all(torch.equal(on[name], off[name]) for name in on)
        assert not torch.equal(on["model.norm.weight"], found["untrained"]), "nothing was trained"
        assert found["on"]["sums"] == 0 and found["off"]["sums"] == 3, "one bucket a step"
    for found in launch(for_nothing, 2, tmp_path, 1):
        assert found["on"]["sums"] == found["off"]["sums"] == 3, "two data-parallel ranks have something to sum"
