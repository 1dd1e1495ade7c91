"""Which optimizers are refused, by which message; and DeepSpeed's Muon, which is right under ZeRO 1 and 2 too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import odd_optimizers as odd
from tests.helpers import optimizers as kinds
from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

VARIANTS = ("phi3", "mixtral")
STAGES = (0, 1, 2)
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}}
UNEQUAL: dict[str, Any] = {"num_key_value_heads": 1}
ALL, FULL, NOT_SO = "optimizer-looks-at-all", "optimizer-needs-full-tensors", "muon-not-sharded-so"


def settings(stage: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **more,
    }  # fmt: skip


def train(engine: Any) -> list[float]:
    from tests.helpers.models import batch

    losses = []
    for seed in range(5):
        loss = engine(input_ids=batch(seed), labels=batch(seed)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("choose")
    for variant in VARIANTS:
        folder = save_checkpoint(work / variant, variant)
        (work / f"{variant}.json").write_text(compile_plan(folder, tp_size=2).to_json())
    folder = save_checkpoint(work / "unequal", "phi3", **UNEQUAL)
    (work / "unequal.json").write_text(compile_plan(folder, tp_size=2).to_json())
    return work


@pytest.fixture(scope="module")
def ranks(work: Path) -> list[dict[str, Any]]:
    (work / "dense.json").write_text(json.dumps(launch(dense_muon, 1, work)[0]))
    return launch(in_ranks, 2, work)


def dense_muon(work: Path) -> dict[str, list[float]]:
    import deepspeed
    import torch

    from tests.helpers.models import load_dense

    torch.compiler.set_stance("force_eager")
    found = {}
    for variant in VARIANTS:
        for stage in STAGES:
            model = load_dense(work / variant)
            config = settings(stage, **MUON)
            engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
            found[f"{variant} ZeRO {stage}"] = train(engine)
    return found


def in_ranks(work: Path) -> dict[str, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.checkpoint.mesh_change import why_this_mesh_only

    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {"refused": refusals(work)}
    for variant in VARIANTS:
        plan = load_plan(work / f"{variant}.json")
        for stage in STAGES:
            model = plan.load_model(work / variant).train()
            engine = plan.initialize(model, config=settings(stage, **MUON))[0]
            key = f"{variant} ZeRO {stage}"
            found[key] = train(engine)
            if variant == "phi3" and stage < 2:
                plan.save_checkpoint(engine, work / key)
                found[f"{key} resumed"] = [train(engine)]
                found[f"{key} other mesh"] = why_this_mesh_only(engine)
                engine = plan.initialize(plan.load_model(work / variant).train(), config=settings(stage, **MUON))[0]
                plan.load_checkpoint(engine, work / key)
                found[f"{key} resumed"].append(train(engine))
    return found


def refusals(work: Path) -> dict[str, tuple[str, str]]:
    """Code and text of what is raised; nothing where nothing is."""
    import torch

    from autotp_plan.runtime import load_plan

    plan = load_plan(work / "phi3.json")
    model = plan.load_model(work / "phi3").train()
    matrices = [one for name, one in model.named_parameters() if one.dim() == 2 and "layers" in name]
    every = list(model.parameters())
    per_head = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2, "per_head_muon": True}}}
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    adafactor = {"optimizer": {"type": "Adafactor", "params": {"lr": 1e-2}}}
    lamb = {"optimizer": {"type": "Lamb"}}
    tried: dict[str, tuple[Any, dict[str, Any]]] = {
        "L-BFGS": (torch.optim.LBFGS(every), settings()),
        "norm of all": (kinds.GlobalNormSgd(every), settings()),
        "noise": (kinds.NoisySgd(every), settings()),
        "collectives": (Communicating(every), settings()),
        "Muon, ZeRO 1": (torch.optim.Muon(matrices), settings(1)),
        "Adafactor, ZeRO 2": (torch.optim.Adafactor(every), settings(2)),
        "LAMB, ZeRO 3": (kinds.Lamb(every), settings(3)),
        "8 bits, ZeRO 1": (kinds.EightBitAdam(every), settings(1)),
        "a function that makes Adafactor": (torch.optim.Adafactor, settings(1)),
        "Adafactor of the config": (None, settings(1, **adafactor)),
        "Lamb of the config": (None, settings(2, **lamb)),
        "Lamb in bf16": (None, settings(0, **lamb, bf16={"enabled": True})),
        "muP": (None, settings(0, optimizer={"type": "MuAdam"})),
        "Muon, ZeRO 3": (None, settings(3, **MUON)),
        "Muon per head": (None, settings(0, **per_head)),
        "Muon, offloaded": (None, {**settings(2, **MUON), **offload}),
        "states of shards": (odd.NormedStateInConstructor(every), settings()),
    }
    found = {
        name: refused(plan.initialize, model, optimizer=one, config=config) for name, (one, config) in tried.items()
    }
    not_adapted = torch.optim.Muon(matrices)
    for one in matrices:
        one.grad = torch.ones_like(one)
    before = [one.detach().clone() for one in matrices]
    found["not adapted"] = refused(not_adapted.step)
    found["not adapted, again"] = refused(not_adapted.step)
    assert all(torch.equal(*pair) for pair in zip(before, matrices, strict=True)), "nothing was stepped"
    sgd = torch.optim.SGD(every, lr=0.1)
    elementwise: list[Any] = [torch.optim.AdamW(every), sgd, kinds.Sophia(every), kinds.Opaque(every)]
    for optimizer in elementwise:
        plan.adapt_optimizer(model, optimizer)
        assert "step" not in vars(optimizer), "it steps as it did"
    plan = load_plan(work / "unequal.json")
    model = plan.load_model(work / "unequal")
    found["Muon on unequal shards"] = refused(plan.initialize, model, config=settings(1, **MUON))
    by_name = [
        [one for name, one in model.named_parameters() if name.endswith("_shared") is end] for end in (True, False)
    ]
    found["split weight"] = refused(plan.adapt_optimizer, model, kinds.Lamb([{"params": some} for some in by_name]))
    return found


def refused(function: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    from autotp_plan.schemas.errors import MismatchError

    try:
        function(*args, **kwargs)
    except MismatchError as error:
        return error.faults[0].code, str(error)
    return "", ""


class Communicating(kinds.Lion):
    """Each rank steps by the mean of all ranks' gradients."""

    def update(self, gradient: Any, parameter: Any, state: Any, group: Any) -> Any:
        import torch.distributed as dist

        dist.all_reduce(gradient)
        return super().update(gradient, parameter, state, group)


CODES = {
    "L-BFGS": ALL, "norm of all": ALL, "noise": ALL, "collectives": ALL, "Muon, ZeRO 1": FULL,
    "Adafactor, ZeRO 2": FULL, "LAMB, ZeRO 3": FULL, "8 bits, ZeRO 1": FULL, "a function that makes Adafactor": FULL,
    "Adafactor of the config": FULL, "Lamb of the config": FULL, "Lamb in bf16": FULL, "muP": FULL,
    "Muon, ZeRO 3": NOT_SO, "Muon per head": NOT_SO, "Muon, offloaded": NOT_SO, "Muon on unequal shards": NOT_SO,
    "not adapted": "optimizer-not-adapted", "not adapted, again": "optimizer-not-adapted",
    "split weight": "split-weight", "states of shards": "optimizer-state-of-shards",
}  # fmt: skip
TEXTS = {
    "Muon, ZeRO 1": ("optimizer Muon", '{"stage": 0}', '"type": "Muon"'),
    "Adafactor of the config": ("optimizer Adafactor", '{"stage": 0}', "AdamW"),
    "Muon, ZeRO 3": ('"stage": 2',),
    "not adapted": ("optimizer Muon", "plan.adapt_optimizer(model, optimizer)", "plan.initialize"),
    "noise": ("optimizer NoisySgd", "AdamW"),
    "states of shards": ("optimizer NormedStateInConstructor", "before the first step"),
    "split weight": ("qkv_proj.weight", "_shared"),
}


def test_what_cannot_be_right_is_refused_by_name(ranks: Any) -> None:
    for rank in ranks:
        assert {name: code for name, (code, _) in rank["refused"].items()} == CODES
        for name, words in TEXTS.items():
            for word in words:
                assert word in rank["refused"][name][1], name


def test_deepspeeds_muon_takes_the_steps_of_the_unsharded_engine(work: Path, ranks: Any) -> None:
    dense = json.loads((work / "dense.json").read_text())
    for variant in VARIANTS:
        for stage in STAGES:
            key = f"{variant} ZeRO {stage}"
            for rank in ranks:
                assert rank[key] == pytest.approx(dense[key], rel=1e-5), key


def test_a_job_of_deepspeeds_muon_is_resumed(ranks: Any) -> None:
    for stage in (0, 1):
        for rank in ranks:
            job, resumed = rank[f"phi3 ZeRO {stage} resumed"]
            assert job == resumed
            assert ("Muon" if stage else "ZeRO stage 0") in rank[f"phi3 ZeRO {stage} other mesh"], "no other mesh"
