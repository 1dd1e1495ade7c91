"""Steps on full tensors with data-parallel ranks and on four TP ranks, and of fused weights in parts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.communication import planted
from tests.helpers.launch import launch
from tests.runtime.optimizers.test_choose import MUON, settings
from tests.runtime.optimizers.test_steps import exact_muon

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

FUSED: dict[str, dict[str, Any]] = {"phi3": {}, "two KV heads": {"num_key_value_heads": 2}, "mixtral": {}}
"""On four ranks two KV heads are partly replicated, in a weight of unequal shards."""
STAGES = {"phi3": (0, 1, 2), "mixtral": (0, 1)}
STEPS = 5


def losses(forward: Any, backward: Any, step: Any, seed: int = 0, micro: int = 1) -> list[float]:
    """Of `micro` batches a step from `seed` on; the mean of their losses."""
    from tests.helpers.models import batch

    found = []
    for number in range(STEPS):
        total = 0.0
        for at in range(micro):
            tokens = batch(100 * (seed + at) + number)
            loss = forward(input_ids=tokens, labels=tokens).loss
            backward(loss / micro)
            total += loss.item() / micro
        step()
        found.append(total)
    return found


def own_loop(model: Any, optimizer: Any, micro: int = 1) -> list[float]:
    import torch

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        model.zero_grad()

    return losses(model, lambda loss: loss.backward(), step, micro=micro)


def of_engine(engine: Any, seed: int = 0) -> list[float]:
    return losses(engine, engine.backward, engine.step, seed)


def muon(model: Any) -> Any:
    import torch

    return torch.optim.Muon([one for name, one in model.named_parameters() if one.dim() == 2 and "layers" in name])


def sizes(model: Any) -> dict[str, tuple[list[int], int]]:
    """The sizes of q, k and v, and of gate and up, and their dimension."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    key = head * config.num_key_value_heads
    return {"qkv_proj": ([config.hidden_size, key, key], 0), "gate_up_proj": ([config.intermediate_size] * 2, -2)}


def split(model: Any, optimizer: Any) -> None:
    """Let `optimizer` have views of q, k, v, gate and up in the place of the fused weights of an unsharded model."""
    import torch

    fused = {
        id(one): where for name, one in model.named_parameters() for kind, where in sizes(model).items() if kind in name
    }
    views = []
    for group in optimizer.param_groups:
        listed = []
        for one in group["params"]:
            if id(one) not in fused:
                listed.append(one)
                continue
            numbers, dim = fused[id(one)]
            parts = [torch.nn.Parameter(part) for part in torch.split(one.data, numbers, dim)]
            views += [(part, one, at, numbers, dim) for at, part in enumerate(parts)]
            listed += parts
        group["params"][:] = listed

    def give_gradients(*_: Any) -> None:
        for part, one, at, numbers, dim in views:
            part.grad = torch.split(one.grad, numbers, dim)[at].clone()

    optimizer.register_step_pre_hook(give_gradients)


def split_updates(model: Any) -> Any:
    """While active, what ZeRO orthogonalises of an unsharded model are q, k, v, gate and up, known by their shapes."""
    import torch
    from deepspeed.runtime.zero.muon import original_muon

    update = original_muon.muon_update
    by_shape = {
        one.shape: where
        for name, one in model.named_parameters()
        for kind, where in sizes(model).items()
        if kind in name
    }

    def of_parts(grad: Any, momentum: Any, *args: Any, **kwargs: Any) -> Any:
        if grad.shape not in by_shape:
            return update(grad, momentum, *args, **kwargs)
        numbers, dim = by_shape[grad.shape]
        parts = zip(grad.split(numbers, dim), momentum.split(numbers, dim), strict=True)
        return torch.cat([update(one.clone(), of_it, *args, **kwargs) for one, of_it in parts], dim)

    return planted(original_muon, "muon_update", of_parts)


def load_dense(folder: Path, dtype: Any) -> Any:
    from tests.helpers import models

    return models.load_dense(folder, dtype, **models.eager_experts(dtype))


def of_one_rank(work: Path) -> dict[str, Any]:
    """The unsharded model, by torch and by DeepSpeed; and plans of one rank."""
    import deepspeed
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    with exact_muon():
        for name in FUSED:
            model = load_dense(work / name, torch.float64)
            found[f"{name}, fused"] = own_loop(model, muon(model))
            model = load_dense(work / name, torch.float64)
            optimizer = muon(model)
            split(model, optimizer)
            found[name] = own_loop(model, optimizer)
        model = load_dense(work / "phi3", torch.float64)
        found["Adafactor, two batches"] = own_loop(model, torch.optim.Adafactor(model.parameters()), micro=2)
        plan = TrainingPlan(compile_plan(work / "phi3", tp_size=1))
        model = plan.load_model(work / "phi3", dtype=torch.float64).train()
        optimizer = muon(model)
        plan.adapt_optimizer(model, optimizer, split_fused=True)
        found["one rank"] = own_loop(model, optimizer)
    for name, stages in STAGES.items():
        for stage in stages:
            for is_split in (True, False):
                model = load_dense(work / name, torch.float32)
                parameters = list(model.parameters())
                engine = deepspeed.initialize(model=model, config=settings(stage, **MUON), model_parameters=parameters)[
                    0
                ]
                if is_split and stage == 0:
                    split(model, engine.basic_optimizer)
                with split_updates(model) if is_split else contextlib.nullcontext():
                    found[key_of(name, is_split, stage)] = of_engine(engine)
    return found


def key_of(name: str, is_split: bool, stage: int) -> str:
    return f"DeepSpeed, {name}{'' if is_split else ', fused'}, ZeRO {stage}"


def of_four_ranks(work: Path) -> dict[str, Any]:
    """TP = 4."""
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan
    from tests.helpers.models import eager_experts

    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    for name in FUSED:
        plan = TrainingPlan(compile_plan(work / name, tp_size=4))
        model: Any = plan.load_model(work / name, dtype=torch.float64, **eager_experts(torch.float64)).train()
        optimizer = muon(model)
        plan.adapt_optimizer(model, optimizer, split_fused=True)
        with exact_muon():
            found[name] = own_loop(model, optimizer)
        if name == "phi3":
            found["state"] = resumed(plan, work / name, model, optimizer)
        for stage in STAGES.get(name, ()):
            for is_split in (True, False):
                model = plan.load_model(work / name, **eager_experts(torch.float32)).train()
                engine = plan.initialize(model, config=settings(stage, **MUON), split_fused=is_split)[0]
                found[key_of(name, is_split, stage)] = of_engine(engine)
    return found


def resumed(plan: Any, folder: Path, model: Any, optimizer: Any) -> tuple[list[float], list[float]]:
    """More steps, and these of an optimizer that loads the state."""
    import copy

    import torch

    weights = [one.detach().clone() for one in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    with exact_muon():
        more = own_loop(model, optimizer)
        again = plan.load_model(folder, dtype=torch.float64).train()
        with torch.no_grad():
            for one, saved in zip(again.parameters(), weights, strict=True):
                one.copy_(saved)
        loaded = muon(again)
        plan.adapt_optimizer(again, loaded, split_fused=True)
        loaded.load_state_dict(state)
        return more, own_loop(again, loaded)


def of_two_by_two(work: Path) -> dict[str, Any]:
    """TP = 2, DP = 2: each DP rank has batches of its own."""
    import torch
    import torch.distributed as dist

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    torch.compiler.set_stance("force_eager")
    plan = TrainingPlan(compile_plan(work / "phi3", tp_size=2))

    def mean(values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=plan.ranks.dp_group)
        return (total / 2).tolist()

    found = {}
    model: Any = plan.load_model(work / "phi3").train()
    adafactor = torch.optim.Adafactor(model.parameters())
    engine = plan.initialize(model, config=settings(0), optimizer=adafactor)[0]
    found["Adafactor"] = mean(of_engine(engine, plan.ranks.dp_rank))
    for stage in (0, 1, 2):
        model = plan.load_model(work / "phi3").train()
        engine = plan.initialize(model, config=settings(stage, **MUON))[0]
        found[f"Muon, ZeRO {stage}"] = of_engine(engine)  # the same batches on both: as one DP rank
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("meshes")
    for name, changes in FUSED.items():
        save_checkpoint(work / name, "mixtral" if name == "mixtral" else "phi3", **changes)
    return work


@pytest.fixture(scope="module")
def wanted(work: Path) -> dict[str, Any]:
    return launch(of_one_rank, 1, work)[0]


def test_sub_parameters_are_stepped_as_in_a_model_whose_weights_are_split(work: Path, wanted: dict[str, Any]) -> None:
    assert wanted["one rank"] == pytest.approx(wanted["phi3"], rel=1e-6)
    for found in launch(of_four_ranks, 4, work):
        for name in FUSED:
            fused = wanted[f"{name}, fused"]
            has_fused_matrices = name != "mixtral"  # torch's Muon takes no weights of three dimensions
            assert (wanted[name] == pytest.approx(fused, rel=1e-5)) is not has_fused_matrices, "there is a difference"
            assert found[name] == pytest.approx(wanted[name], rel=1e-6), name
        more, loaded = found["state"]
        assert more == loaded, "the state of each sub-parameter is saved and loaded"
        for name, stages in STAGES.items():
            for stage in stages:
                keys = [key_of(name, is_split, stage) for is_split in (True, False)]
                is_equal = wanted[keys[0]] == pytest.approx(wanted[keys[1]], rel=1e-5)
                assert not is_equal or name == "mixtral", "there is a difference"
                for key in keys:
                    assert found[key] == pytest.approx(wanted[key], rel=1e-5), key


def test_full_steps_with_data_parallel_ranks(work: Path, wanted: dict[str, Any]) -> None:
    for found in launch(of_two_by_two, 4, work):
        assert found["Adafactor"] == pytest.approx(wanted["Adafactor, two batches"], rel=1e-5)
        for stage in (0, 1, 2):
            fused = wanted[f"DeepSpeed, phi3, fused, ZeRO {stage}"]
            assert found[f"Muon, ZeRO {stage}"] == pytest.approx(fused, rel=1e-5), stage
