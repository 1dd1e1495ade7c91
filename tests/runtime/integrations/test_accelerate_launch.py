"""`accelerate launch`: where it starts one process only, the refusal says what starts several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import PACKAGE

SCRIPT = "import sys; from autotp_plan.runtime import load_plan; load_plan(sys.argv[1]).load_model(sys.argv[2])"


@pytest.mark.timeout(120)
def test_one_process_of_accelerate_launch_is_told_what_starts_several(tmp_path: Path) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    save_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "plan.json").write_text(compile_plan(tmp_path / "model", tp_size=2).to_json())
    (tmp_path / "load.py").write_text(SCRIPT)
    launcher = Path(sys.executable).with_name("accelerate")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    found = subprocess.run(
        [launcher, "launch", "--cpu", "--num_processes", "2", "load.py", "plan.json", "model"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment, "PYTHONPATH": str(PACKAGE.parent), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert found.returncode == 1
    assert "the number of processes does not fit the plan" in found.stderr
    assert "torchrun --nproc-per-node 2" in found.stderr and "starts one process" in found.stderr


@pytest.mark.parametrize("names", [0, 1, 2])
def test_ranks_of_mpirun_are_taken(names: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp_plan.runtime.deepspeed import mesh

    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(key, "")  # so that it is as before afterwards
        monkeypatch.delenv(key)
    rank, size, local_rank = mesh._MPI[names]
    for key, value in ((rank, "3"), (size, "4"), (local_rank, "1")):
        monkeypatch.setenv(key, value)
    mesh.check_world_size(2)
    assert [os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    mesh.check_world_size(2)
    assert os.environ["WORLD_SIZE"] == "2", "what torchrun says counts"
