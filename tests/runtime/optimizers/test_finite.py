"""NaN and inf in a gradient, a loss or a weight stop training on every rank, with names; planted here one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_plan.runtime.optimizers.finite import EVERY, FiniteCheck, _not_finite, count_nonfinite
from autotp_plan.schemas.errors import NonFiniteError
from tests.helpers.launch import launch

NAME = "model.layers.0.mlp.down_proj.weight"


def test_what_is_not_finite_is_named_and_counted() -> None:
    wrong = torch.ones(3, 4)
    wrong[1, 2], wrong[2, 3] = torch.nan, -torch.inf
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensors = [("fine", torch.ones(2, dtype=dtype)), ("wrong", wrong.to(dtype)), ("none", torch.ones(0))]
        assert _not_finite([*tensors, ("numbers", torch.ones(2, dtype=torch.int64))]) == ["wrong"]
        assert count_nonfinite(wrong.to(dtype)) == 2
    assert count_nonfinite(torch.ones(2, dtype=torch.int64)) == 0


class Engine:
    """What `FiniteCheck` asks of an engine; its steps are skipped because gradients were not finite."""

    def __init__(self, fp16: bool) -> None:
        self.fp16, self.global_steps, self.device, self.module = fp16, 0, torch.device("cpu"), torch.nn.Linear(2, 2)
        optimizer: Any = torch.optim.SGD(self.module.parameters())
        self.optimizer, optimizer.overflow = optimizer, False

    def fp16_enabled(self) -> bool:
        return self.fp16

    def get_global_grad_norm(self) -> float:
        return float("inf")

    def step(self) -> None:
        self.optimizer.overflow = True
        self.global_steps += 1
        self.optimizer.zero_grad()


def test_a_step_that_loss_scaling_skips_is_no_stop() -> None:
    scaled, other = Engine(fp16=True), Engine(fp16=False)
    check = FiniteCheck(scaled, 0)
    for _ in range(EVERY):
        check.see(torch.tensor(torch.nan))
        with check.during_step():
            scaled.step()
    other.module.bias.grad = torch.full((2,), torch.nan)
    with (
        pytest.raises(
            NonFiniteError,
            match=r"step 1\n.*gradients of bias, in .* group 0 \(lr 0.001, weight_decay 0\); the weights are those",
        ),
        FiniteCheck(other, 0).during_step(),
    ):
        other.step()
    with FiniteCheck(other, 0, stops=False).during_step():
        other.step()
    scaled.module.bias.data[0] = torch.inf
    with pytest.raises(NonFiniteError, match="weights of bias"):
        check.before_save()


def refusal(call: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """Where the error that `call(*args)` ends in is, and what was got."""
    from autotp_plan.schemas.errors import NonFiniteError

    try:
        call(*args)
    except NonFiniteError as error:
        (fault,) = error.faults
        return fault.where, fault.got
    return "no error", ""


def steps(engine: Any, number: int, seed: int, loss: Callable[[int, Any], Any] = lambda step, loss: loss) -> None:
    for step in range(engine.global_steps + 1, engine.global_steps + number + 1):
        tokens = torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(seed + step))
        out = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss(step, out))
        engine.step()


def on_two_tp_ranks(work: Path) -> dict[str, Any]:
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from tests.helpers.parity import engine_settings

    plan, found = load_plan(work / "plan.json"), {}
    kinds: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
        "ZeRO 0, float32": (0, torch.float32, {"gradient_clipping": 0.0}),
        "ZeRO 0, bf16": (0, torch.bfloat16, {"bf16": {"enabled": True}}),
        "ZeRO 1, float32": (1, torch.float32, {}),
        "ZeRO 1, bf16": (1, torch.bfloat16, {"bf16": {"enabled": True}}),
        "ZeRO 2, bf16": (2, torch.bfloat16, {"bf16": {"enabled": True}}),
        "ZeRO 3, bf16": (3, torch.bfloat16, {"bf16": {"enabled": True}}),
        "ZeRO 3, float32": (3, torch.float32, {}),
    }

    def halved(optimizer: Any) -> Any:
        """The learning rate is halved after the third step, at which a gradient is bad: the message has that before."""
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    for kind, (stage, dtype, changes) in kinds.items():
        model: Any = plan.load_model(work / "model", dtype=dtype).train()
        vectors = [one for one in model.parameters() if one.dim() < 2]
        matrices = [one for one in model.parameters() if one.dim() > 1]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 0.002, "weight_decay": 0.1}]
        engine, *_ = plan.initialize(
            model, config={**engine_settings(stage), **changes}, model_parameters=groups, lr_scheduler=halved
        )
        parameter, bad = model.get_parameter(NAME), [False]

        def plant(gradient: torch.Tensor, bad: list[bool] = bad) -> torch.Tensor:
            return gradient * torch.inf if bad[0] and dist.get_rank() == 1 else gradient

        parameter.register_hook(plant)
        fine = refusal(steps, engine, 2, 0)
        bad[0] = True
        found[kind] = fine, refusal(steps, engine, 9, 0)
    found.update(saving(work, plan))
    return found


def saving(work: Path, plan: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from tests.helpers.parity import engine_settings

    found: dict[str, Any] = {}
    for stage in (1, 3):
        for stops in (True, False):
            model: Any = plan.load_model(work / "model", dtype=torch.float32).train()
            engine, *_ = plan.initialize(model, config=engine_settings(stage), check_finite=stops)
            jobs = work / f"jobs {stage} {stops}"
            plan.save_checkpoint(engine, jobs, "sound")
            with torch.no_grad():
                parameter = model.get_parameter(NAME)
                if dist.get_rank() == 1:
                    (parameter.ds_tensor if stage == 3 else parameter).view(-1)[5] = torch.nan
            name = f"ZeRO {stage}, {'stops' if stops else 'goes on'}"
            found[name] = refusal(plan.save_checkpoint, engine, jobs, "nan")
            found[f"{name}, by the engine"] = refusal(engine.save_checkpoint, str(jobs / "engine"), "nan")
            found[f"{name}, latest"] = (jobs / "latest").read_text()
    return found


def on_two_dp_ranks(work: Path) -> dict[str, Any]:
    """The loss is NaN on one of them; in float32 without ZeRO nobody computes a norm."""
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from tests.helpers.parity import engine_settings

    plan = load_plan(work / "plan1.json")
    me = dist.get_rank()
    found = {}

    def nan_on_one(step: int, loss: Any) -> Any:
        return loss * torch.nan if step == 4 and me else loss

    for stops in (True, False):
        model: Any = plan.load_model(work / "model", dtype=torch.float32).train()
        engine, *_ = plan.initialize(model, config={**engine_settings(0), "gradient_clipping": 0.0}, check_finite=stops)
        found[f"loss, {stops}"] = refusal(
            steps, engine, 12, me, lambda step, loss: loss * torch.nan if step == 4 and me else loss
        )
        found[f"steps, {stops}"] = engine.global_steps
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("finite")
    folder = save_checkpoint(work / "model", "llama")
    (work / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    (work / "plan1.json").write_text(compile_plan(folder, tp_size=1).to_json())
    return work


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_gradients_that_are_not_finite_stop_all_ranks(work: Path) -> None:
    first, second = launch(on_two_tp_ranks, 2, work)
    assert first == second
    fine = ("no error", "")
    group = "in the optimizer's parameter group 1 (lr 0.002, weight_decay 0.1)"
    named = f"NaN or inf in the gradients of {NAME}, {group}"
    skipped = (f"{named}; the weights are those of the step before",)
    for kind in ("ZeRO 0, bf16", "ZeRO 1, float32", "ZeRO 1, bf16", "ZeRO 2, bf16", "ZeRO 3, bf16", "ZeRO 3, float32"):
        assert first[kind] == (fine, ("step 3", *skipped)), kind
    assert first["ZeRO 0, float32"][0] == fine
    where, got = first["ZeRO 0, float32"][1]
    assert where == "step 4, found after step 10" and "NaN or inf in the weights of " in got
    assert "in the optimizer's parameter groups 0 (lr 0.00" in got and ", 1 (lr 0.00" in got, got
    for stage in (1, 3):
        refused = ("step 0: the weights, which are not saved", f"NaN or inf in the weights of {NAME}")
        assert first[f"ZeRO {stage}, stops"] == first[f"ZeRO {stage}, stops, by the engine"] == refused
        assert first[f"ZeRO {stage}, stops, latest"] == "sound"
        assert first[f"ZeRO {stage}, goes on"] == first[f"ZeRO {stage}, goes on, by the engine"] == fine
        assert first[f"ZeRO {stage}, goes on, latest"] == "nan"


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_loss_that_is_not_finite_on_one_dp_rank_stops_all(work: Path) -> None:
    first, second = launch(on_two_dp_ranks, 2, work)
    assert first == second
    assert first["loss, True"][0] == "step 4, found after step 10" and first["steps, True"] == 10
    assert first["loss, False"] == ("no error", "") and first["steps, False"] == 12
