"""Reading shards: the right bytes, to any dtype, in pieces as small as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autotp_plan.planner import SpecFile, compile_plan
from autotp_plan.runtime import weights
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.schemas.plan import Plan

TENSORS = {
    "a.q.weight": torch.randn(12, 10, generator=torch.Generator().manual_seed(0)),
    "a.o.weight": torch.randn(10, 12, generator=torch.Generator().manual_seed(1)),
    "norm": torch.arange(5).to(torch.int64),
    "scalar": torch.tensor(2.5),
}
SPEC = {
    "layer_specs": [
        {"patterns": [r"a\.q\.weight$"], "shape": [[6, 6], -1], "unit": 2, "indivisible": "uneven"},
        {"patterns": [r"a\.o\.weight$"], "partition_type": "row", "shape": [-1, [6, 6]], "unit": 2,
         "indivisible": "uneven"},
    ]
}  # fmt: skip


@pytest.fixture
def plan_and_folder(tmp_path: Path) -> tuple[Plan, Path]:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "model.safetensors")
    return compile_plan(tmp_path, tp_size=2, specs=[SpecFile.from_dict(SPEC)]), tmp_path


@pytest.mark.parametrize("chunk_bytes", [8, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1])
def test_read_weight(
    plan_and_folder: tuple[Plan, Path],
    monkeypatch: pytest.MonkeyPatch,
    chunk_bytes: int,
    dtype: torch.dtype | None,
    rank: int,
) -> None:
    plan, folder = plan_and_folder
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    rows = [0, 1, 2, 3, 6, 7, 8, 9] if rank == 0 else [4, 5, 10, 11]
    expected = {**TENSORS, "a.q.weight": TENSORS["a.q.weight"][rows], "a.o.weight": TENSORS["a.o.weight"][:, rows]}
    read = {
        weight.name: weights.read_weight(weight, torch.device("cpu"), dtype)
        for weight in weights.open_weights(folder, plan).of_rank(rank)
    }
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert read[name].dtype == wanted.dtype and torch.equal(read[name], wanted), name


def test_a_file_that_shrinks_while_it_is_read(plan_and_folder: tuple[Plan, Path]) -> None:
    plan, folder = plan_and_folder
    source = weights.open_weights(folder, plan)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="a file ended early"):
        for weight in source.of_rank(0):
            weights.read_weight(weight, torch.device("cpu"), None)
