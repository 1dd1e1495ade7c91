"""Options of `load_model` and `initialize` that save work train the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.communication import SWITCHES
from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def train_with_and_without(work: Path, tp_size: int) -> dict[str, Any]:
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


def test_mapped_shards_and_skipped_sums_train_the_same_weights(tmp_path: Path) -> None:
    import torch

    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "llama", "llama")
    for tp_size in (1, 2):
        presplit(compile_plan(folder, tp_size=tp_size), folder, tmp_path / f"shards{tp_size}")
    for found in launch(train_with_and_without, 2, tmp_path, 2):
        on, off = found["on"]["weights"], found["off"]["weights"]
        assert on.keys() == off.keys() and all(torch.equal(on[name], off[name]) for name in on)
        assert not torch.equal(on["model.norm.weight"], found["untrained"]), "nothing was trained"
        assert found["on"]["sums"] == 0 and found["off"]["sums"] == 3, "one bucket a step"
    for found in launch(train_with_and_without, 2, tmp_path, 1):
        assert found["on"]["sums"] == found["off"]["sums"] == 3, "two data-parallel ranks have something to sum"
