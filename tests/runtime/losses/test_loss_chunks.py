"""`load_model(loss_chunks=...)`: losses, gradients and steps of the dense model, and no more than a chunk of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import AutoTPError, OptionError
from tests.helpers.communication import all_reduces, planted
from tests.helpers.launch import launch
from tests.runtime.losses.test_vocab_parallel_loss import widest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

VARIANTS: dict[str, dict[str, Any]] = {
    "llama_bias_tied": {"vocab_size": 257}, "gemma2": {}, "phi": {}, "mixtral": {"output_router_logits": True},
}  # fmt: skip
"""Tied and of an odd vocabulary; with a soft cap; with a bias of the head; with a loss of the router too."""
CHUNKS = 5
WORDS_OF_A_CHUNK = 26
FEATURES = 64
"""The hidden size: what else is widest, with 48 features of the MLP on a rank."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from autotp_plan.planner import compile_plan
    from tests.helpers import parity
    from tests.helpers.models import eager_experts, load_dense, save_checkpoint

    work = tmp_path_factory.mktemp("chunks")
    for variant, changes in VARIANTS.items():
        folder = save_checkpoint(work / variant, variant, **changes)
        for tp_size in (1, 2, 4):
            (work / f"{variant}.tp{tp_size}.json").write_text(compile_plan(folder, tp_size=tp_size).to_json())
        torch.save(
            parity.gradients(load_dense(folder, torch.float64, **eager_experts(torch.float64))),
            work / f"{variant}.dense",
        )
        torch.save(parity.dense_steps(load_dense(folder), accumulation=2), work / f"{variant}.steps")
    return work


def load(work: Path, variant: str, tp_size: int, **options: Any) -> Any:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import eager_experts

    plan = load_plan(work / f"{variant}.tp{tp_size}.json")
    options = {"dtype": torch.float64, "loss_chunks": CHUNKS, **eager_experts(torch.float64), **options}
    return plan, plan.load_model(work / variant, **options).train()


def errors(work: Path, variant: str, tp_size: int) -> float:
    import torch

    from tests.helpers import parity

    plan, model = load(work, variant, tp_size)
    return max(parity.errors_against(torch.load(work / f"{variant}.dense"), model, plan).values())


def equal_the_dense_model(work: Path, tp_size: int, variants: list[str]) -> dict[str, float]:
    return {variant: errors(work, variant, tp_size) for variant in variants}


def engines(work: Path) -> dict[str, Any]:
    """Losses and norms under each ZeRO stage, with gradients accumulated."""
    import torch

    from tests.helpers import parity

    found = {}
    for variant, stage in [("gemma2", 0), ("phi", 2), ("llama_bias_tied", 3)]:
        plan, model = load(work, variant, 2, dtype=torch.float32)
        overlap = {"tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True}}
        changes: dict[str, Any] = overlap if variant == "phi" else {}
        found[f"{variant}, ZeRO {stage}"] = variant, parity.engine_steps(plan, model, stage, accumulation=2, **changes)
    return found


def own_loss_under_zero_3(work: Path) -> tuple[float, float]:
    """The largest difference of a gradient to that of ZeRO 0, of a loss that reads the logits; and the gradient."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    from tests.helpers import parity
    from tests.helpers.models import batch

    found = []
    for stage in (0, 3):
        plan, model = load(work, "llama_bias_tied", 2, dtype=torch.float32)
        engine, *_ = plan.initialize(model, config=parity.engine_settings(stage))
        logits = engine(input_ids=batch(0), labels=batch(0)).logits
        engine.backward(logits.log_softmax(-1)[..., 7].mean())
        found.append(safe_get_full_grad(model.get_parameter("model.embed_tokens.weight")))
    return (found[0] - found[1]).abs().max().item(), found[0].abs().max().item()


def said(function: Any) -> str:
    try:
        function()
    except (AutoTPError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


def softmax_first(original: Any) -> Any:
    """A forward that computes with its logits before the loss."""

    def forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = original(self, input_ids=input_ids, **kwargs)
        output.loss = self.loss_function(logits=output.logits.softmax(-1), labels=labels, vocab_size=257)
        return output

    return forward


def refusals(work: Path) -> dict[str, str]:
    import torch
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    from tests.helpers.models import batch

    inputs = {"input_ids": batch(0), "labels": batch(0)}
    found = {}
    plan, model = load(work, "llama_bias_tied", 2)
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    found["hook"] = said(lambda: model(**inputs))
    hook.remove()
    found["compiled"] = said(lambda: torch.compile(model, backend="eager")(**inputs))
    found["hook removed"] = said(lambda: model(**inputs))
    with planted(LlamaForCausalLM, "forward", softmax_first(LlamaForCausalLM.forward)):
        _, other = load(work, "llama_bias_tied", 2)
        _, without = load(work, "llama_bias_tied", 2, loss_chunks=None)
        found["softmax first"] = said(lambda: other(**inputs))
        found["softmax first, without"] = said(lambda: without(**inputs))
    _, stepped = load(work, "llama_bias_tied", 2)
    late, early = stepped(**inputs), stepped(**inputs)
    computed = early.logits.softmax(-1)
    late.loss.backward()
    torch.optim.SGD(stepped.parameters(), lr=0.1).step()
    found["after a step"] = said(lambda: late.logits.softmax(-1))
    found["before the step"] = str(torch.equal(early.logits.softmax(-1), computed))
    for value in (0, True, "5"):
        found[repr(value)] = said(lambda value=value: load(work, "llama_bias_tied", 2, loss_chunks=value))
    found["full logits"] = said(lambda: load(work, "llama_bias_tied", 2, vocab_parallel_loss=False))
    plan, model = load(work, "phi", 2)
    adapted = plan.add_lora(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    found["adapter"] = said(lambda: adapted(**inputs))
    return found


def with_adapters(work: Path) -> tuple[int, float]:
    """The widest tensor of a step with LoRA, and the largest error of a gradient against a loss without chunks."""
    import torch
    from peft import LoraConfig

    from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64
    from tests.helpers.models import batch

    gradients = []
    for chunks in (None, CHUNKS):
        torch.manual_seed(0)
        plan, model = load(work, "llama_bias_tied", 2, loss_chunks=chunks)
        adapted = plan.add_lora(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        adapted.load_state_dict({n: torch.randn_like(p) for n, p in adapted.named_parameters() if "lora" in n}, False)
        with PromoteToFloat64():
            adapted(input_ids=batch(0), labels=batch(0)).loss.backward()
        gradients.append({name: one.grad for name, one in adapted.named_parameters() if one.requires_grad})
        adapted.zero_grad()
    worst = max((one - gradients[1][name]).abs().max().item() for name, one in gradients[0].items())
    assert min(one.abs().max().item() for one in gradients[0].values()) > 1e-4
    return widest(adapted, input_ids=batch(0), labels=batch(0)), worst


def planted_errors(work: Path) -> dict[str, float]:
    """The error of the proof with something wrong in chunks, or in how they are put together."""
    import torch

    from autotp_plan.runtime.losses import word_chunks
    from autotp_plan.runtime.losses.word_chunks import Gradients, WordChunks, _RunningSums
    from autotp_plan.runtime.tensor_parallel.lazy_logits import LastDimSharding
    from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear

    found = {}

    def wrong(name: str, owner: Any, attribute: str, replacement: Any, variant: str = "gemma2") -> None:
        with planted(owner, attribute, replacement):
            found[name] = errors(work, variant, 2)

    add, right = Gradients._add, ColumnParallelLinear._copied

    def without_last(self: Any) -> Any:
        return iter(list(every(self))[:-1])

    def gradient_of_last(self: Any, words: slice, gradient: Any) -> None:
        if self.found[0] is not None:
            self.found[0].zero_()
        add(self, words, gradient)

    def not_moved(self: Any, highest: Any) -> None:
        self.highest = highest

    def this_rank_alone(self: Any, sharding: Any, *others: Any) -> Any:
        return sums(self, LastDimSharding(None, (sharding.held,), 0), *others)

    every, sums = WordChunks.__iter__, _RunningSums.over_ranks
    wrong("last chunk left out", WordChunks, "__iter__", without_last)
    wrong("hidden gradient of the last chunk alone", Gradients, "_add", gradient_of_last)
    wrong("sums of another largest logit", _RunningSums, "_move_to", not_moved)
    wrong("sums of this rank alone", _RunningSums, "over_ranks", this_rank_alone)
    wrong("soft cap forgotten", WordChunks, "finished", lambda self, product: product.to(torch.float64))
    wrong("gradient not all-reduced", ColumnParallelLinear, "_copied",
          lambda self, input, always=False: input if always else right(self, input))  # fmt: skip
    wrong("chunk of another rank's words", word_chunks, "find_held", lambda ids, held: (ids.clamp(0, 100), ids >= 0))
    return found


def neighbours(work: Path) -> dict[str, Any]:
    """Recomputed activations, autocast, a copy of the model, what is communicated, what others ask of the forward."""
    import copy
    import inspect

    import torch

    from autotp_plan.runtime.verify.float64_passes import PromoteToFloat64
    from tests.helpers import parity
    from tests.helpers.models import batch

    found: dict[str, Any] = {}
    inputs = {"input_ids": batch(0), "labels": batch(0)}
    plan, model = load(work, "gemma2", 2)
    _, without = load(work, "gemma2", 2, loss_chunks=None)
    dense = torch.load(work / "gemma2.dense")
    names = list(dense["gradient"])
    plain = parity.sharded_gradients(model, names, promote=False)  # what autograd computes again is not promoted
    for reentrant in (True, False):
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        again = parity.sharded_gradients(model, names, promote=False)
        found[f"recomputed, reentrant {reentrant}"] = max(parity.differences(plain, again, plan).values())
    model.zero_grad()
    model.gradient_checkpointing_disable()
    found["copy"] = max(parity.errors_against(dense, copy.deepcopy(model), plan).values())
    found["copy, untouched"] = model.get_parameter("lm_head.weight").grad
    found["arguments"] = list(inspect.signature(model.forward).parameters) == list(
        inspect.signature(without.forward).parameters
    )
    shapes, numbers = [], []
    for one in (model, without):
        one(**inputs)  # whose first forward compares the batches of the ranks
        with all_reduces() as reduced, PromoteToFloat64():
            one(**inputs).loss.backward()
        shapes.append(sorted(reduced))
        one.zero_grad()
        one.float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(**inputs).loss
        loss.backward()
        numbers.append(
            (loss.item(), one.model.norm.weight.grad.clone(), one.lm_head.get_parameter("weight").grad.clone())
        )
    found["communicated"] = shapes
    found["autocast"] = [
        abs(numbers[0][0] - numbers[1][0]),
        *(((one - other).norm() / other.norm()).item() for one, other in zip(numbers[0][1:], numbers[1][1:])),
    ]
    return found


def in_two_ranks(work: Path) -> dict[str, Any]:
    from tests.helpers.models import batch

    found: dict[str, Any] = {"errors": equal_the_dense_model(work, 2, list(VARIANTS))}
    _, model = load(work, "llama_bias_tied", 2)
    model(input_ids=batch(0))  # whose first forward compares the batches of the ranks
    found["widest"] = widest(model, input_ids=batch(0), labels=batch(0))
    model.eval()
    found["evaluation"] = type(model(input_ids=batch(0), labels=batch(0)).logits).__name__
    found["planted"] = planted_errors(work)
    found["refusals"] = refusals(work)
    found["neighbours"] = neighbours(work)
    found["adapters"] = with_adapters(work)
    found["engines"] = engines(work)
    found["own loss under ZeRO 3"] = own_loss_under_zero_3(work)
    return found


@pytest.fixture(scope="module")
def two_ranks(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = launch(in_two_ranks, 2, work)[0]
    return found


def test_losses_and_every_gradient_equal_the_dense_models(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["errors"].keys() == VARIANTS.keys()
    assert max(two_ranks["errors"].values()) < 1e-9, two_ranks["errors"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_preset(tmp_path: Path) -> None:
    import torch

    from autotp_plan.planner import compile_plan
    from tests.helpers import parity
    from tests.helpers.models import PRESET_VARIANTS, eager_experts, load_dense, save_checkpoint

    for variant in PRESET_VARIANTS:
        folder = save_checkpoint(tmp_path / variant, variant)
        (tmp_path / f"{variant}.tp2.json").write_text(compile_plan(folder, tp_size=2).to_json())
        dense = load_dense(folder, torch.float64, **eager_experts(torch.float64))
        torch.save(parity.gradients(dense), tmp_path / f"{variant}.dense")
    found = launch(equal_the_dense_model, 2, tmp_path, 2, PRESET_VARIANTS, timeout=800)[0]
    assert found.keys() == set(PRESET_VARIANTS)
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("tp_size", [1, 4])
def test_they_do_on_one_rank_and_on_four(work: Path, tp_size: int) -> None:
    found = launch(equal_the_dense_model, tp_size, work, tp_size, ["llama_bias_tied", "phi"])[0]
    assert max(found.values()) < 1e-9, found


def test_no_rank_holds_more_than_a_chunk_of_its_logits(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["widest"] == FEATURES > WORDS_OF_A_CHUNK
    assert two_ranks["evaluation"] == "Tensor", "there they are gathered, as anyone may read them"


def test_engine_steps_equal_the_dense_models(work: Path, two_ranks: dict[str, Any]) -> None:
    import torch

    assert len(two_ranks["engines"]) == 3
    for name, (variant, steps) in two_ranks["engines"].items():
        expected = torch.load(work / f"{variant}.steps")
        assert len(steps) == len(expected)
        for (loss, norm), (dense_loss, dense_norm) in zip(steps, expected):
            assert loss == pytest.approx(dense_loss, rel=1e-5), name
            assert norm == pytest.approx(dense_norm, rel=1e-5), name


def test_a_loss_of_ones_own_reads_the_logits_under_zero_3(two_ranks: dict[str, Any]) -> None:
    difference, largest = two_ranks["own loss under ZeRO 3"]
    assert difference < 1e-6 < 1e-3 < largest


def test_adapters_of_other_layers_are_right_and_in_chunks(two_ranks: dict[str, Any]) -> None:
    wide, error = two_ranks["adapters"]
    assert error < 1e-12
    assert wide == FEATURES


def test_recomputed_activations_and_copies(two_ranks: dict[str, Any]) -> None:
    found = two_ranks["neighbours"]
    for name in ("recomputed, reentrant True", "recomputed, reentrant False", "copy"):
        assert found[name] < 1e-9, name
    assert found["copy, untouched"] is None
    assert found["arguments"], "Trainer chooses a dataset's columns by them"


def test_ranks_send_what_they_send_without_chunks(two_ranks: dict[str, Any]) -> None:
    in_chunks, without = two_ranks["neighbours"]["communicated"]
    assert in_chunks == without and (24,) in without and (2, 24) in without


def test_products_are_of_the_dtype_of_autocast(two_ranks: dict[str, Any]) -> None:
    loss, of_norm, of_head = two_ranks["neighbours"]["autocast"]
    assert loss < 1e-5 and 0 < of_norm < 0.02 and of_head < 0.02


def test_errors_planted_in_chunks_are_noticed(two_ranks: dict[str, Any]) -> None:
    assert len(two_ranks["planted"]) == 7
    for name, error in two_ranks["planted"].items():
        assert error > 1e-4, f"{name} went unnoticed"


@pytest.mark.parametrize(
    ("case", "parts"),
    {
        "hook": ("LlamaForCausalLM", "its head has a forward hook", "load_model without loss_chunks"),
        "compiled": ("its forward is compiled by torch.compile",),
        "softmax first": ("LlamaForCausalLM.forward", "a call of softmax", "load_model without loss_chunks"),
        "after a step": ("output.logits of LlamaForCausalLM", "before the step, or load_model without loss_chunks"),
        "0": ("got:      0", "a whole number from 1"),
        "True": ("got:      True",),
        "'5'": ("got:      '5'",),
        "full logits": ("vocab_parallel_loss=False",),
        "adapter": ("PhiForCausalLM", "its head is a peft.tuners.lora", "without an adapter"),
    }.items(),
)
def test_what_is_not_known_to_be_right_is_refused(two_ranks: dict[str, Any], case: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        assert part in two_ranks["refusals"][case]


def test_what_a_refusal_proposes_works(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["refusals"]["before the step"] == "True"
    assert (
        two_ranks["refusals"]["hook removed"] == two_ranks["refusals"]["softmax first, without"] == "nothing was said"
    )


def test_a_model_with_another_loss_is_refused() -> None:
    from torch import nn

    from autotp_plan.runtime.losses.chunked_loss import check_loss_chunks, use_chunked_loss

    with pytest.raises(AutoTPError, match="its loss is a loss of its own"):
        use_chunked_loss(nn.Linear(1, 1), 4)
    with pytest.raises(OptionError):
        check_loss_chunks(-1, True)
    check_loss_chunks(None, False)
