"""Rewards that every process makes by itself are, on all TP ranks, those of the first of its group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch


def gathered(plan_file: Path) -> dict[str, list[float]]:
    """What a rank gets when each gives its own number, as accelerate gathers it and as trainers that generate do."""
    import torch
    from accelerate import Accelerator

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.integrations.accelerator import gather_of_each

    ranks = load_plan(plan_file).init_mesh()
    accelerator: Any = Accelerator(cpu=True)
    mine = torch.tensor([10.0 * ranks.dp_rank + ranks.tp_rank])
    return {"all": accelerator.gather(mine).tolist(), "once": gather_of_each(accelerator, ranks)(mine).tolist()}


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_the_first_tp_rank_of_each_group_decides(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.checkpoints import write_llama

    path = tmp_path / "plan.json"
    path.write_text(compile_plan(write_llama(tmp_path / "llama"), tp_size=2).to_json())
    for found in launch(gathered, 4, path):
        assert found["all"] == [0.0, 1.0, 10.0, 11.0], "they differ between the TP ranks"
        assert found["once"] == [0.0, 10.0]
