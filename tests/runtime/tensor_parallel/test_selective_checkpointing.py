"""Selective activation checkpointing: the numbers of a model without it, and no product or collective made again."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.helpers.operators import counted

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

DROPOUT = {"gpt2": (), "bloom": ("hidden_dropout", "attention_dropout"), "llama": ("attention_dropout",), "mixtral": ()}
IN_FLOAT64 = "gpt2"
"""A model that casts nothing to float32."""
KINDS = (None, "full", "selective")


def prepare(work: Path, name: str, tp_size: int, **changes: Any) -> None:
    """`name/` and `name.json`."""
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(work / name, name, **changes)
    (work / f"{name}.json").write_text(compile_plan(folder, tp_size=tp_size).to_json())


def load(work: Path, name: str, **options: Any) -> Any:
    import torch

    from autotp_plan.runtime import load_plan

    options = {"dtype": torch.float64, "experts_implementation": "eager", **options}
    plan = load_plan(work / f"{name}.json")
    return plan, plan.load_model(work / name, **options).train()


def in_float64(model: Any, tokens: Any) -> Any:
    """Loss and logits; transformers' loss casts logits to float32."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean(), logits


def gradients(plan: Any, model: Any) -> Any:
    import torch

    from tests.helpers import parity

    torch.manual_seed(3)
    names = [parameter.name for parameter in plan.document.expanded()]
    model.zero_grad()
    return parity.sharded_gradients(model, names, in_float64, promote=False)


def numbers(work: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Inside a rank: differences that checkpointing makes, dropout on, and the error against the dense model."""
    import torch

    from tests.helpers import parity

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        of: dict[str | None, Any] = {}
        ran: dict[str | None, Counter[str]] = {}
        for kind in KINDS:
            plan, model = load(work, name, activation_checkpointing=kind, attn_implementation="eager")
            of[kind], ran[kind] = counted(partial(gradients, plan, model))
        found[name] = {
            kind: max(parity.differences(of[None], of[kind], plan).values()) for kind in ("full", "selective")
        }
        for operator in ("c10d::allreduce_", "aten::mm", "aten::addmm", "aten::_softmax", "aten::native_dropout"):
            found[name][operator] = [ran[kind][operator] for kind in KINDS]
        if name == IN_FLOAT64:
            found[name]["dense"] = max(parity.errors(torch.load(work / "dense"), of["selective"], plan).values())
    return found


@pytest.mark.parametrize("tp_size", [1, 2])
def test_numbers_and_what_is_computed_again(tmp_path: Path, tp_size: int) -> None:
    import torch

    from autotp_plan.runtime.verify.float64_passes import dense_reader, run_passes
    from tests.helpers.models import batch, load_dense

    names = list(DROPOUT) if tp_size == 2 else [IN_FLOAT64]
    for name in names:
        prepare(tmp_path, name, tp_size, **dict.fromkeys(DROPOUT[name], 0.3))
    dense = load_dense(tmp_path / IN_FLOAT64, torch.float64)
    of_all = [name for name, _ in dense.named_parameters()]
    torch.save(
        run_passes(dense, dense_reader(dense), of_all, batch, forward=in_float64, promote=False), tmp_path / "dense"
    )
    for found in launch(numbers, tp_size, tmp_path, names):
        for name, of in found.items():
            assert of["full"] < 1e-12 and of["selective"] < 1e-12, (name, of)
            assert of.get("dense", 0) < 1e-12, (name, of)
            none, full, selective = of["c10d::allreduce_"]
            assert selective == none and (full > none or tp_size == 1), f"{name}: no all-reduce is made again"
            for product in ("aten::mm", "aten::addmm"):
                none, full, selective = of[product]
                assert selective == none <= full, f"{name}: no {product} is made again"
            none, full, selective = of["aten::_softmax"]
            assert selective == full > none, f"{name}: attention is computed again"


def adapters(work: Path) -> float:
    """Inside a rank: the difference that it makes to the gradients of LoRA."""
    import torch
    from peft import LoraConfig

    from tests.helpers.models import batch

    found = []
    for kind in (None, "selective"):
        plan, model = load(work, "llama", activation_checkpointing=kind)
        torch.manual_seed(5)
        with_lora = plan.add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]))
        trained = [parameter for parameter in with_lora.parameters() if parameter.requires_grad]
        torch.manual_seed(7)
        for parameter in trained:
            torch.nn.init.normal_(parameter, std=0.1)
        with_lora.train()(input_ids=batch(1), labels=batch(1)).loss.backward()
        found.append([parameter.grad for parameter in trained])
    assert all(one is not None and one.abs().max() > 0 for one in found[0])
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))


def keeps_what_operators_return() -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        is_kept = operator.name() in ("aten::mm", "c10d::allreduce_")
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def planted_errors(work: Path) -> dict[str, Any]:
    """Inside a rank: what is seen of errors in what is kept."""
    from autotp_plan.runtime.loading.activation_checkpointing import use_activation_checkpointing
    from autotp_plan.runtime.tensor_parallel import collectives, kept_results
    from autotp_plan.schemas.errors import MismatchError
    from autotp_plan.schemas.upstream import replaced
    from tests.helpers import parity
    from tests.helpers.models import batch

    plan, model = load(work, "llama", activation_checkpointing="selective")
    right, ran = counted(partial(gradients, plan, model))
    found: dict[str, Any] = {"right": ran["c10d::allreduce_"]}

    def always(add_up: Any, input: Any, *, is_product: bool) -> Any:
        return kept_results._summed(add_up, input)

    with replaced(collectives, "kept_sum", always):
        wrong, ran = counted(partial(gradients, plan, model))
        found["not kept"] = ran["c10d::allreduce_"], max(parity.differences(right, wrong, plan).values())
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keeps_what_operators_return})
    found["torch keeps it"] = max(parity.differences(right, gradients(plan, model), plan).values())
    use_activation_checkpointing(model, "selective")
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, output: output.mul_(1.5))
    try:
        model(input_ids=batch(1), labels=batch(1)).loss.backward()
    except MismatchError as error:
        found["changed in place"] = str(error)
    use_activation_checkpointing(model, "full")
    full = gradients(plan, model)
    model.gradient_checkpointing_disable()
    found["full instead"] = max(parity.differences(gradients(plan, model), full, plan).values())
    use_activation_checkpointing(model, "selective")
    hook.remove()
    loss = model(input_ids=batch(1), labels=batch(1)).loss
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        found["twice"] = str(error)
    except MismatchError as error:
        found["twice"] = str(error)
    return found


def others(work: Path) -> tuple[float, dict[str, Any]]:
    return adapters(work), planted_errors(work)


def test_adapters_and_planted_errors(tmp_path: Path) -> None:
    prepare(tmp_path, "llama", 2)
    for difference, found in launch(others, 2, tmp_path):
        assert difference < 1e-12
        count, error = found["not kept"]
        assert count > found["right"] and error < 1e-12, "sums that are made again are right, and cost"
        assert found["torch keeps it"] > 1e-6, "what torch keeps of an operator in place is not the sum"
        assert "changed in place" in found["changed in place"]
        assert found["full instead"] < 1e-12, "what is said to do next is right"
        assert "backward" in found["twice"]


EXPERTS = {"batched_mm": "aten::bmm", "grouped_mm": "aten::_grouped_mm"}
"""Ways to compute all experts in one product, and its operator; torch has none for groups in float64."""


def experts(work: Path) -> dict[str, Any]:
    """Inside a rank: of experts in one product, the difference that it makes, and the products of each kind."""
    import torch

    from tests.helpers import parity

    found = {}
    for implementation, operator in EXPERTS.items():
        of, ran = {}, {}
        for kind in KINDS:
            dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
            options = {"dtype": dtype, "experts_implementation": implementation}
            plan, model = load(work, "mixtral", activation_checkpointing=kind, **options)
            of[kind], ran[kind] = counted(partial(gradients, plan, model))
        different = [max(parity.differences(of[None], of[kind], plan).values()) for kind in ("full", "selective")]
        found[implementation] = max(different), [ran[kind][operator] for kind in KINDS]
    return found


def by_trainer(work: Path) -> list[Any]:
    """Inside a rank: losses and norms of a Trainer without checkpointing, by its arguments, and by load_model."""
    import torch

    from autotp_plan.runtime import selective_checkpointing
    from tests.runtime.calls.trainer_calls import make_trainer, numbers

    selective = {"use_reentrant": False, "context_fn": selective_checkpointing}
    ways: list[tuple[str | None, dict[str, Any]]] = [
        (None, {}), ("selective", {}), (None, {"gradient_checkpointing": True}),
        (None, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": selective}),
    ]  # fmt: skip
    found = []
    for kind, options in ways:
        plan, model = load(work, "llama", dtype=torch.float32, activation_checkpointing=kind)
        trainer = make_trainer(model, work / "out", **options)
        plan.adapt_trainer(trainer)
        found.append(numbers(trainer))
    return found


def by_training_program(work: Path) -> list[str]:
    """Inside a rank: what the training program writes of its steps, by each kind."""
    from autotp_plan.runtime.train import _train

    found = []
    for kind in KINDS:
        metrics = work / f"{kind}.metrics"
        _train(
            work / "llama.json", str(work / "llama"), dp_size=None, zero_stage=1, batch_size=1, seq_length=8,
            learning_rate=1e-2, precision="fp32", data=None, ds_config=None, seed=0, save_every=None, num_steps=2,
            save_shards=None, checkpoints=None, metrics=metrics, activation_checkpointing=kind,
        )  # fmt: skip
        found.append(metrics.read_text() if metrics.exists() else "")
    return found


def ways(work: Path) -> Any:
    return experts(work), by_trainer(work), by_training_program(work)


def test_experts_trainers_and_the_training_program(tmp_path: Path) -> None:
    import json

    for name in ("llama", "mixtral"):
        prepare(tmp_path, name, 2)
    found = launch(ways, 2, tmp_path)
    for of_experts, of_trainers, _ in found:
        for implementation, (difference, ran) in of_experts.items():
            assert difference < 1e-12, implementation
            none, full, selective = ran
            assert none < full and selective <= full, implementation
        none, full, selective = of_experts["grouped_mm"][1]
        assert selective == none, "products of experts are kept; batched_mm copies weights for each token first"
        without, *others = of_trainers
        assert without and all(other == without for other in others)
    steps = [[json.loads(line)["loss"] for line in one.splitlines()] for one in found[0][2]]
    assert len(steps[0]) == 2 and steps[0] == steps[1] == steps[2]


def steps(work: Path) -> dict[int, Any]:
    """Inside a rank: (loss, gradient norm) of each step by ZeRO stage."""
    import torch

    from tests.helpers import parity

    found = {}
    for stage in range(4):
        zero: Any = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}} if stage == 3 else {}
        plan, model = load(work, "llama", dtype=torch.float32, activation_checkpointing="selective")
        found[stage] = parity.engine_steps(plan, model, stage, **zero)
    return found


def test_steps_of_every_zero_stage_are_the_dense_models(tmp_path: Path) -> None:
    import torch

    from tests.helpers import parity
    from tests.helpers.models import load_dense

    prepare(tmp_path, "llama", 2)
    dense = parity.dense_steps(load_dense(tmp_path / "llama", torch.float32), dp_size=2)
    for found in launch(steps, 4, tmp_path):
        for stage, of_stage in found.items():
            for one, other in zip(of_stage, dense, strict=True):
                assert one == pytest.approx(other, rel=1e-5), stage


def gradient_of_biased_products(context: Any) -> Any:
    """Of the input of two products, whose bias is added in place as DeepSpeed's linear layer of ZeRO 3 does."""
    import torch
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(3)
    first, second, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4), (4, 4), (4,)))

    def layer(input: Any) -> Any:
        hidden = input.matmul(first)  # of three dimensions: torch counts the version of the product apart
        hidden += bias
        return (hidden.tanh().matmul(second) * hidden.sin()).exp()

    input = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    output = layer(input) if context is None else checkpoint(layer, input, use_reentrant=False, context_fn=context)
    output.sum().backward()
    return input.grad


def test_a_product_that_is_changed_in_place_is_computed_again() -> None:
    import torch

    from autotp_plan.runtime import selective_checkpointing
    from autotp_plan.runtime.tensor_parallel.kept_results import _Layer
    from autotp_plan.schemas.upstream import replaced

    expected = gradient_of_biased_products(None)
    assert torch.equal(gradient_of_biased_products(selective_checkpointing), expected)
    with replaced(_Layer, "forget_changed", lambda layer, tensors: None):
        assert not torch.allclose(gradient_of_biased_products(selective_checkpointing), expected), "twice the bias"
