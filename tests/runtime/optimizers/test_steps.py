"""Five steps of optimizers that look at whole tensors, sharded, are those of the unsharded model; and own clipping."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {"phi3": {}, "mixtral": {}},
    4: {"phi3": {"num_key_value_heads": 2}, "qwen3_moe": {"num_key_value_heads": 2}},
}
"""By number of TP ranks. On four ranks two KV heads are partly replicated: in phi3's fused weight, and in k and v."""
IN_ENGINE = ("Adafactor", "transformers' Adafactor", "LAMB")
TOLERANCE = 2e-6  # transformers computes the loss in float32
ORDERS = (2.0, 1.0, 3.0, math.inf)


def optimizers(tp_size: int) -> dict[str, Callable[[Any], Any]]:
    """Makers of an optimizer of a model; on four ranks, one of a kind."""
    import torch
    from transformers import Adafactor

    from tests.helpers import odd_optimizers as odd
    from tests.helpers import optimizers as kinds

    def matrices(model: Any) -> list[Any]:
        return [one for name, one in model.named_parameters() if one.dim() == 2 and "layers" in name]

    def groups(model: Any) -> list[Any]:
        by_dim = [[one for one in model.parameters() if (one.dim() > 1) is many] for many in (True, False)]
        return [{"params": by_dim[0]}, {"params": by_dim[1], "lr": 3e-3}]

    makers: dict[str, Callable[[Any], Any]] = {
        "Muon": lambda model: torch.optim.Muon(matrices(model), lr=1e-2),
        "Muon, moonlight": lambda model: torch.optim.Muon(matrices(model), lr=1e-2, adjust_lr_fn="match_rms_adamw"),
        "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.1),
        "transformers' Adafactor": lambda model: Adafactor(model.parameters()),
        "transformers' Adafactor, fixed": lambda model: Adafactor(
            groups(model), lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9
        ),
        "LAMB": lambda model: kinds.Lamb(groups(model)),
        "LARS": lambda model: kinds.Lars(model.parameters()),
        "Shampoo": lambda model: kinds.Shampoo(matrices(model), lr=1e-3),
        "SOAP": lambda model: kinds.Soap(matrices(model), lr=1e-3),
        "flags in its state": lambda model: odd.FlaggedByState(matrices(model)),
        "counts in its state": lambda model: odd.CountInState(matrices(model)),
        "8 bits": lambda model: kinds.EightBitAdam(model.parameters(), lr=1e-3),
        "AdamW": lambda model: torch.optim.AdamW(groups(model), lr=1e-3),
    }
    return makers if tp_size == 2 else {name: makers[name] for name in ("Muon", *IN_ENGINE, "AdamW")}


@contextlib.contextmanager
def exact_muon() -> Iterator[None]:
    """Newton-Schulz in float64: in bfloat16 the last digit of a gradient changes percents of the update."""
    from torch.optim import _muon

    from tests.helpers.communication import planted
    from tests.helpers.optimizers import exact_orthogonalisation

    with planted(_muon, "_zeropower_via_newtonschulz", exact_orthogonalisation):
        yield


def steps(forward: Any, backward: Any, step: Any) -> list[float]:
    from tests.helpers.models import batch

    losses = []
    for seed in range(5):
        tokens = batch(seed)
        loss = forward(input_ids=tokens, labels=tokens).loss
        backward(loss)
        step()
        losses.append(loss.item())
    return losses


def dense_losses(folder: Path, make: Callable[[Any], Any]) -> list[float]:
    import torch

    from tests.helpers.models import eager_experts, load_dense

    model = load_dense(folder, torch.float64, **eager_experts(torch.float64))
    optimizer = make(model)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    return steps(model, lambda loss: loss.backward(), step)


def dense_norms(folder: Path) -> list[float]:
    import torch

    from tests.helpers.models import batch, eager_experts, load_dense

    model = load_dense(folder, torch.float64, **eager_experts(torch.float64))
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return [torch.nn.utils.get_total_norm(gradients, order).item() for order in ORDERS]


@pytest.fixture(scope="module", params=[2, 4])
def tp_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def results(tp_size: int, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("optimizers")
    dense: dict[str, Any] = {}
    for variant, changes in CASES[tp_size].items():
        folder = save_checkpoint(work / variant, variant, **changes)
        (work / f"{variant}.json").write_text(compile_plan(folder, tp_size=tp_size).to_json())
        with exact_muon():
            dense |= {f"{variant} {name}": dense_losses(folder, make) for name, make in optimizers(tp_size).items()}
        dense[f"{variant} norms"] = dense_norms(folder)
    return dense, launch(in_ranks, tp_size, work, list(CASES[tp_size]))


def in_ranks(work: Path, variants: list[str]) -> dict[str, Any]:
    import torch

    from autotp_plan.runtime import load_plan

    found: dict[str, Any] = {}
    for variant in variants:
        plan = load_plan(work / f"{variant}.json")
        tp_size = plan.tp_size
        load = functools.partial(load_sharded, plan, work / variant)
        with exact_muon():
            for name, make in optimizers(tp_size).items():
                found[f"{variant} {name}"] = own_loop(plan, load(), make)
        found[f"{variant} norms"] = own_norms(load())
        if variant == "phi3":
            found["elements"] = state_elements(plan, load())
            with exact_muon():
                found["planted"] = {name: own_loop(None, load(), make) for name, make in optimizers(tp_size).items()}
            small = functools.partial(load, torch.float32)
            for name in IN_ENGINE:
                found[f"engine {name}"] = in_engine(plan, small, work / f"job {name}", name)
    return found


def load_sharded(plan: Any, folder: Path, dtype: Any = None) -> Any:
    import torch

    options = {"experts_implementation": "eager"} if dtype is None else {}
    return plan.load_model(folder, dtype=dtype or torch.float64, **options).train()


def own_loop(plan: Any, model: Any, make: Callable[[Any], Any]) -> list[float]:
    """Without an engine, clipped by torch; without a plan the optimizer is not adapted."""
    import torch

    from autotp_plan.runtime.optimizers.choose import _checked

    optimizer = make(model)
    if plan is not None:
        plan.adapt_optimizer(model, optimizer)
    else:
        _checked.add(optimizer)  # else its first step is refused

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    return steps(model, lambda loss: loss.backward(), step)


def state_elements(plan: Any, model: Any) -> int:
    """Elements of the optimizer's state on this rank after a step."""
    optimizer = optimizers(plan.tp_size)["Muon"](model)
    plan.adapt_optimizer(model, optimizer)
    model(input_ids=torch_batch(), labels=torch_batch()).loss.backward()
    optimizer.step()
    return sum(value.numel() for state in optimizer.state.values() for value in state.values())


def torch_batch() -> Any:
    from tests.helpers.models import batch

    return batch(0)


def in_engine(plan: Any, load: Any, folder: Path, name: str) -> list[list[float]]:
    """Losses of an engine: five steps, five more, and these of a job that is resumed."""
    losses = []
    for is_resumed in (False, True):
        model = load()
        config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "steps_per_print": 10**9}
        engine = plan.initialize(model, config=config, optimizer=optimizers(plan.tp_size)[name](model))[0]
        if is_resumed:
            plan.load_checkpoint(engine, folder)
        else:
            losses.append(steps(engine, engine.backward, engine.step))
            plan.save_checkpoint(engine, folder)
        losses.append(steps(engine, engine.backward, engine.step))
    return losses


def own_norms(model: Any) -> list[float]:
    import torch

    from tests.helpers.models import batch

    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return [torch.nn.utils.get_total_norm(gradients, order).item() for order in ORDERS]


def test_losses_are_those_of_the_unsharded_model(tp_size: int, results: Any) -> None:
    dense, ranks = results
    for variant in CASES[tp_size]:
        for name in optimizers(tp_size):
            for found in ranks:
                key = f"{variant} {name}"
                assert found[key] == pytest.approx(dense[key], rel=TOLERANCE), key


def test_the_norm_of_all_gradients_is_the_unsharded_models(tp_size: int, results: Any) -> None:
    dense, ranks = results
    for variant in CASES[tp_size]:
        for found in ranks:
            assert found[f"{variant} norms"] == pytest.approx(dense[f"{variant} norms"], rel=1e-6)


def test_the_state_is_divided_among_the_ranks(tp_size: int, results: Any) -> None:
    sizes = [found["elements"] for found in results[1]]
    num_kv_heads = CASES[tp_size]["phi3"].get("num_key_value_heads", 4)
    matrices = 2 * 64 * (64 + 64 + 2 * 8 * num_kv_heads + 3 * 96)
    assert sum(sizes) == matrices
    assert max(sizes) < 1.5 * matrices / tp_size


def test_engines_take_the_same_steps_and_resume_them(results: Any) -> None:
    dense, ranks = results
    for name in IN_ENGINE:
        for found in ranks:
            first, second, resumed = found[f"engine {name}"]
            assert first == pytest.approx(dense[f"phi3 {name}"], rel=1e-5), name
            assert second == resumed


def test_optimizers_that_are_not_adapted_are_found(results: Any) -> None:
    dense, ranks = results
    for name, losses in ranks[0]["planted"].items():
        equal = losses == pytest.approx(dense[f"phi3 {name}"], rel=1e-5)
        assert equal is (name == "AdamW"), name
