"""fp16 with DeepSpeed's engine and loss scalers: steps that they skip are no stop. A weight too large for F16 is said.

On a CPU whose mkldnn has no fp16, DeepSpeed refuses it: here it is told that there is. torch computes it all the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

NAME = "model.layers.0.mlp.down_proj.weight"
SCALE = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 1000, "min_loss_scale": 4}
MOST_SKIPPED = 6


def stages(work: Path) -> dict[str, Any]:
    """Inside a rank: for each ZeRO stage, what each of five steps did; the third has an overflow on one rank."""
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.optimizers import finite
    from tests.helpers.parity import engine_settings

    finite.MOST_SKIPPED = MOST_SKIPPED
    get_accelerator().is_fp16_supported = lambda: True
    plan, found = load_plan(work / "plan.json"), {}
    tokens = torch.arange(16).reshape(2, 8)
    for stage in range(4):
        model: Any = plan.load_model(work / "model").train()
        engine, *_ = plan.initialize(model, config={**engine_settings(stage), "fp16": SCALE})
        bad = [False]

        def plant(gradient: torch.Tensor, bad: list[bool] = bad) -> torch.Tensor:
            return gradient * torch.inf if bad[0] and dist.get_rank() == 1 else gradient

        def step(engine: Any = engine) -> tuple[int, float, bool]:
            before = held(engine)
            loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            same = all(torch.equal(one, other) for one, other in zip(before, held(engine), strict=True))
            return engine.skipped_steps, float(engine.optimizer.loss_scale), same

        model.get_parameter(NAME).register_hook(plant)
        seen = []
        for number in range(1, 6):
            bad[0] = number == 3
            seen.append(step())
        found[f"stage {stage}"] = {"dtype": str(model.get_parameter(NAME).dtype), "steps": seen}
        bad[0] = True
        for _ in range(2 * MOST_SKIPPED):
            try:
                step()
            except Exception as error:
                found[f"stage {stage}"]["in the end"] = f"{type(error).__name__}: {error}"
                break
    return found | {"shards": too_large(work, plan)}


def held(engine: Any) -> list[Any]:
    """What this rank holds of the weights."""
    return [getattr(one, "ds_tensor", one).detach().clone() for one in engine.module.parameters()]


def too_large(work: Path, plan: Any) -> list[str]:
    """Train an F16 checkpoint in float32, make two weights too large for F16, and save it."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import logger

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    handler = Kept(logging.WARNING)
    logger.addHandler(handler)
    model = plan.load_model(work / "model", dtype=torch.float32)
    plan.save_shards(model, work / "sound")
    with torch.no_grad():
        if dist.get_rank() == 1:
            model.get_parameter(NAME).view(-1)[:2] = torch.tensor([65504.0, 65520.0])  # the largest, and the first past
        model.get_parameter("model.norm.weight")[0] = -1e6
    plan.save_shards(model, work / "large")
    logger.removeHandler(handler)
    return [one.replace(str(work), "") for one in said if "NaN or inf" in one]


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_loss_scaling_skips_steps_and_a_weight_too_large_is_said(tmp_path: Path) -> None:
    import torch

    from autotp_plan.planner import compile_plan, merge
    from autotp_plan.schemas.storage.checkpoint import read_checkpoint
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "model", "llama", torch.float16)
    (tmp_path / "plan.json").write_text(compile_plan(folder, tp_size=2).to_json())
    first, second = launch(stages, 2, tmp_path)
    for stage in range(4):
        for found in (first[f"stage {stage}"], second[f"stage {stage}"]):
            assert found["dtype"] == "torch.float16"
            assert found["steps"] == [(0, 16, False), (0, 16, False), (1, 8, True), (1, 8, False), (1, 8, False)], stage
            if stage:
                assert "Current loss scale already at minimum" in found["in the end"], found
                continue
            assert found["in the end"].startswith("NonFiniteError: training has come to NaN or inf"), found
            assert "step 11\n" in found["in the end"]
            assert f"gradients of {NAME}, in the optimizer's parameter group 0 (lr" in found["in the end"]
            assert "the weights are those of 6 steps before, skipped since" in found["in the end"]
    named = f"model.norm.weight (1 elements), {NAME} (1 elements)"
    assert first["shards"] == [
        "/large holds NaN or inf, in the model or because a weight is larger than the dtype of the file can "
        f"say: {named}"
    ]
    assert second["shards"] == [], "the first rank alone"
    merge(tmp_path / "large", tmp_path / "merged")
    entry = read_checkpoint(tmp_path / "merged").tensors[NAME]
    assert entry.dtype == "F16"
    data = bytearray(Path(str(entry.file)).read_bytes()[entry.start : entry.stop])
    weight = torch.frombuffer(data, dtype=torch.float16)
    assert int(weight.isinf().sum()) == 1 and 65504.0 in weight
