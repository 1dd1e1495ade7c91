"""The mesh is made once, when it is asked for, and reading it changes nothing."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.checkpoints import write_llama

    work = tmp_path_factory.mktemp("mesh")
    path = work / "plan.json"
    path.write_text(compile_plan(write_llama(work / "llama"), tp_size=2).to_json())
    return path


def test_reading_the_ranks_does_not_make_them(plan_file: Path) -> None:
    import torch

    from autotp_plan.runtime import load_plan

    before = dict(os.environ)
    with pytest.raises(MismatchError, match=r"call plan\.init_mesh\(\) first"):
        _ = load_plan(plan_file).ranks
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


def in_four_ranks(plan_file: Path) -> tuple[int, int, int, int, bool]:
    from deepspeed.utils import groups

    from autotp_plan.runtime import load_plan

    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute of its package it is torch itself
    build = backend.build_shm_op
    plan = load_plan(plan_file)
    ranks = plan.init_mesh()
    assert plan.init_mesh() is ranks and plan.ranks is ranks, "it is made once"
    assert load_plan(plan_file).init_mesh().tp_group is ranks.tp_group, "another plan of the size has the same groups"
    assert backend.build_shm_op is build, "DeepSpeed is left as it was"
    same = ranks.tp_group is groups.get_tensor_model_parallel_group()
    return ranks.tp_rank, ranks.tp_size, ranks.dp_rank, ranks.dp_size, same


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_tp_ranks_are_next_to_each_other(plan_file: Path) -> None:
    found = launch(in_four_ranks, 4, plan_file, timeout=100)
    assert found == [(0, 2, 0, 2, True), (1, 2, 0, 2, True), (0, 2, 1, 2, True), (1, 2, 1, 2, True)]


def test_a_rank_without_a_device_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp_plan.runtime.deepspeed import mesh

    class TwoCards:
        def device_name(self) -> str:
            return "cuda"

        def device_count(self) -> int:
            return 2

        def set_device(self, number: int) -> None:
            raise AssertionError(f"device {number}")

    monkeypatch.setattr(mesh, "get_accelerator", TwoCards)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(AssertionError, match="device 1"):  # the last that there is
        mesh.init_ranks(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MismatchError, match="fewer devices than ranks") as caught:
        mesh.init_ranks(2)
    assert "LOCAL_RANK of rank 3" in str(caught.value) and "start 2 processes" in str(caught.value)
