"""A job saved on TP=2 x DP=2 goes on on TP=4 x DP=1 and back, with the losses of the job that was never moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused and grouped": ("phi3", {}),  # with two KV heads: at TP=4 a rank's shard is held in two parameters
    "experts": ("mixtral", {}),
    "uneven": (
        "llama",
        {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96, "head_dim": 8, "vocab_size": 257},
    ),
}
MESHES = {"2x2": 2, "4x1": 4}
RUNS = [(name, stage) for name in MODELS for stage in (1, 2, 3)]
NUM_STEPS, SAVED_AT = 6, 3
NUM_WINDOWS = 16  # four optimizer steps make an epoch, so that one ends after the move


def start(
    work: Path, name: str, tp_size: int, stage: int, frozen: str = "", scale: float = 1.0, **changes: Any
) -> tuple[Any, Any, Any]:
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens
    from tests.helpers import parity

    plan = load_plan(work / f"{name} {tp_size}.json")
    torch.manual_seed(11)
    settings = parity.engine_settings(stage, **{"accumulation": tp_size // 2, **changes})
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 2e-3}}
    model = plan.load_model(work / name, dtype=torch.bfloat16 if "bf16" in changes else None).train()
    for key, parameter in model.named_parameters():
        if frozen and frozen in key:
            parameter.requires_grad_(False).mul_(scale)
    data = TokenDataset(synthetic_tokens(250, 12 * NUM_WINDOWS), 12)
    engine, _, loader, _ = plan.initialize(model, config=settings, training_data=data)
    return plan, engine, loader


def steps(plan: Any, engine: Any, loader: Any, first: int, last: int, save: Any = None) -> list[float]:
    """The loss of each optimizer step, averaged over its whole batch."""
    import torch

    from autotp_plan.runtime.data.sampler import endless

    source, found = endless(loader), []
    for step in range(first, last):
        total = torch.zeros(())
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(**next(source), use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total, group=plan.ranks.dp_group)
        found.append((total / plan.ranks.dp_size / engine.gradient_accumulation_steps()).item())
        if save is not None and step + 1 == SAVED_AT:
            plan.save_checkpoint(engine, save, client_state={"mine": step})
    return found


def undisturbed(work: Path, mesh: str) -> dict[str, list[float]]:
    found = {}
    for name, stage in RUNS:
        plan, engine, loader = start(work, name, MESHES[mesh], stage)
        folder = work / f"{name} zero{stage} {mesh}"
        found[f"{name} zero{stage}"] = steps(plan, engine, loader, 0, NUM_STEPS, folder)
        engine.destroy()
    return found


def moved(work: Path, mesh: str, saved_on: str) -> dict[str, list[float]]:
    found = {}
    for name, stage in RUNS:
        plan, engine, loader = start(work, name, MESHES[mesh], stage)
        assert plan.load_checkpoint(engine, work / f"{name} zero{stage} {saved_on}") == {"mine": SAVED_AT - 1}
        found[f"{name} zero{stage}"] = steps(plan, engine, loader, SAVED_AT, NUM_STEPS)
        engine.destroy()
    if saved_on == "2x2":
        found.update(_planted(work, mesh, saved_on))
    return found


def _planted(work: Path, mesh: str, saved_on: str) -> dict[str, list[float]]:
    """What the losses are when something of the optimizer is lost or wrong on the way; and from stage 1 to 3."""
    from autotp_plan.runtime.checkpoint.zero_files import SavedJob

    found = {}
    shard, scalars = SavedJob.shard, SavedJob.scalars

    def without(lost: str) -> Any:
        return lambda self, name, key, *rest: shard(self, name, key, *rest) * (key != lost)

    def of_another_rank(self: Any, name: str, key: str, layout: Any, tp_rank: int) -> Any:
        other = tp_rank ^ 1 if key == "exp_avg" and layout.dim is not None else tp_rank
        same = layout.dim is None or layout.rank_shape(other) == layout.rank_shape(tp_rank)
        return shard(self, name, key, layout, other if same else tp_rank)

    faults: dict[str, tuple[Any, Any]] = {
        "lost exp_avg": (without("exp_avg"), scalars),
        "lost exp_avg_sq": (without("exp_avg_sq"), scalars),
        "lost step": (shard, lambda self, name: {k: v * 0 + 1 for k, v in scalars(self, name).items()}),
        "another rank's exp_avg": (of_another_rank, scalars),
        "nothing": (shard, scalars),
    }
    for fault, replaced in faults.items():
        SavedJob.shard, SavedJob.scalars = replaced  # type: ignore[method-assign]
        plan, engine, loader = start(work, "experts", MESHES[mesh], 3)
        plan.load_checkpoint(engine, work / f"experts zero1 {saved_on}")
        found[fault] = steps(plan, engine, loader, SAVED_AT, NUM_STEPS)
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("remesh")
    for name, (variant, changes) in MODELS.items():
        folder = save_checkpoint(work / name, variant, **changes)
        for tp_size in MESHES.values():
            plan = compile_plan(folder, tp_size=tp_size, uneven=name == "uneven")
            (work / f"{name} {tp_size}.json").write_text(plan.to_json())
    return work


def test_a_job_resumes_on_another_mesh_and_back_with_the_same_losses(work: Path) -> None:
    whole = {mesh: launch(undisturbed, 4, work, mesh, timeout=240) for mesh in MESHES}
    for mesh, saved_on in (("4x1", "2x2"), ("2x2", "4x1")):
        for rank, found in enumerate(launch(moved, 4, work, mesh, saved_on, timeout=300)):
            expected = whole[saved_on][rank]
            for name, _ in faults_of(found):
                worst = max(abs(a / b - 1) for a, b in zip(found[name], expected["experts zero1"][SAVED_AT:]))
                assert (worst > 1e-5) is (name != "nothing"), f"{name}: {worst}"
            for run, losses in expected.items():
                assert found[run] == pytest.approx(losses[SAVED_AT:], rel=1e-6), f"{run} from {saved_on} to {mesh}"


ARRIVALS = {  # the model, the ZeRO stages before and after, the engine's settings, what is frozen
    "bf16": ("fused and grouped", (1, 2), {"bf16": {"enabled": True}}, ""),
    "bf16 at stage 3": ("experts", (2, 3), {"bf16": {"enabled": True}}, ""),
    "frozen": ("uneven", (2, 1), {}, "embed_tokens"),
    "frozen and shared": ("fused and grouped", (1, 1), {}, "qkv_proj"),
}


def saved_at_once(work: Path, mesh: str, saved_on: str | None) -> None:
    for name, (model, stages, settings, frozen) in ARRIVALS.items():
        first = saved_on is None
        scale = 1.5 if first else 1.0  # a frozen weight is not what the checkpoint holds, so it must arrive too
        plan, engine, loader = start(work, model, MESHES[mesh], stages[not first], frozen, scale, **settings)
        if first:
            steps(plan, engine, loader, 0, 2)
        else:
            plan.load_checkpoint(engine, work / f"{name} {saved_on}")
        plan.save_checkpoint(engine, work / f"{name} {mesh}", "it")
        engine.destroy()


def test_every_number_of_the_optimizer_arrives_on_another_mesh(work: Path) -> None:
    import torch

    from autotp_plan.runtime.checkpoint.zero_files import SavedJob
    from autotp_plan.schemas.layout import Layout
    from autotp_plan.schemas.plan.document import Plan

    launch(saved_at_once, 4, work, "2x2", None, timeout=150)
    launch(saved_at_once, 4, work, "4x1", "2x2", timeout=150)
    for name, (model, stages, _, frozen) in ARRIVALS.items():
        jobs = [
            SavedJob(work / f"{name} {mesh}" / "it", Plan.read(work / f"{model} {tp}.json"), 4 // tp, stage)
            for (mesh, tp), stage in zip(MESHES.items(), stages)
        ]
        for parameter in jobs[0].plan.expanded():
            before, after = (job.keys(parameter.name) for job in jobs)
            assert before == after == ([] if frozen and frozen in parameter.name else ["fp32", "exp_avg", "exp_avg_sq"])
            whole = Layout(shape=jobs[0].plan.shape_of(parameter))
            for key in before or ["fp32"]:
                one, other = (job.shard(parameter.name, key, whole, 0) for job in jobs)
                assert one.abs().max() > 0 and torch.equal(one, other), f"{name}: {key} of {parameter.name}"
            assert jobs[0].scalars(parameter.name) == jobs[1].scalars(parameter.name)


def without_zero(work: Path, saved_on: str | None) -> list[float]:
    from autotp_plan.schemas.errors import MismatchError

    plan, engine, loader = start(work, "experts", 2, 0, accumulation=1 if saved_on is None else 2)
    if saved_on is None:
        losses = steps(plan, engine, loader, 0, NUM_STEPS, work / "zero0")
        engine.destroy()
        plan, engine, _ = start(work, "experts", 2, 1)
        plan.save_checkpoint(engine, work / "experts zero1")
        return losses
    plan.load_checkpoint(engine, work / "zero0")
    found = steps(plan, engine, loader, SAVED_AT, NUM_STEPS)
    with pytest.raises(MismatchError, match="only the number of DP ranks may change"):
        plan.load_checkpoint(engine, work / "experts zero1")
    return found


def test_without_zero_only_the_number_of_dp_ranks_may_change(work: Path) -> None:
    whole = launch(without_zero, 4, work, None, timeout=100)
    for rank, losses in enumerate(launch(without_zero, 2, work, "2x2", timeout=100)):
        assert losses == pytest.approx(whole[rank][SAVED_AT:], rel=1e-6)


def faults_of(found: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return [(name, losses) for name, losses in found.items() if "zero" not in name]
