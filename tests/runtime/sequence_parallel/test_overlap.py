"""With `tp_overlap_comm`, products and collectives along the sequence are made in chunks: the numbers stay the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_plan.planner import compile_plan
from autotp_plan.runtime import TrainingPlan
from autotp_plan.runtime.estimate.fake_internals import Watch
from autotp_plan.runtime.verify.compare import scaled_error
from tests.helpers.launch import launch
from tests.helpers.models import batch, eager_experts, save_checkpoint

VARIANTS = ("llama", "gpt2", "opt", "mixtral")
"""Transposed weights with biases, tokens in one dimension, experts."""


def numbers(model: Any, length: int) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Loss and every gradient of a step, and its collectives."""
    model.zero_grad()
    found: Counter[str] = Counter()
    tokens = batch(length)[:, :length]
    with Watch(lambda name, *_: found.update([name])):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    return {"loss": loss.detach(), **{name: one.grad.clone() for name, one in model.named_parameters()}}, found


def differences(folder: Path, variant: str, kind: str | None) -> list[tuple[float, bool]]:
    """For even and uneven lengths: the largest difference, and whether collectives along the sequence are in chunks."""
    from deepspeed.module_inject.layers import TensorParallel_Layer

    plan = TrainingPlan(compile_plan(folder / variant, tp_size=2, sequence_parallel=True))
    options: Any = eager_experts(torch.float64)
    model = plan.load_model(folder / variant, dtype=torch.float64, activation_checkpointing=kind, **options).train()
    differences = []
    for length in (12, 11, 3):
        plain, few = numbers(model, length)
        TensorParallel_Layer.tp_overlap_comm = True
        try:
            overlapped, many = numbers(model, length)
        finally:
            TensorParallel_Layer.tp_overlap_comm = False
        largest = max(scaled_error(one, overlapped[name]) for name, one in plain.items())
        in_chunks = (
            many["_allgather_base_"] > few["_allgather_base_"] and many["alltoall_base_"] > few["alltoall_base_"]
        )
        differences.append((largest, in_chunks and many["allreduce_"] == few["allreduce_"]))
    return differences


def every(folder: Path) -> dict[str, list[tuple[float, bool]]]:
    found = {variant: differences(folder, variant, None) for variant in VARIANTS}
    return {**found, "selective": differences(folder, "llama", "selective"), "planted": planted(folder)}


def planted(folder: Path) -> list[tuple[float, bool]]:
    """The gradient of gathered tokens in chunks that lie elsewhere."""
    from autotp_plan.runtime.sequence_parallel import overlapped
    from autotp_plan.schemas.upstream import replaced

    rows = overlapped._rows
    with replaced(overlapped, "_rows", lambda full, chunk: rows(full, chunk).flip(1)):
        return differences(folder, "llama", None)


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_overlapping_changes_no_number(tmp_path: Path) -> None:
    for variant in VARIANTS:
        save_checkpoint(tmp_path / variant, variant, torch.float64)
    for rank in launch(every, 2, tmp_path):
        wrong = rank.pop("planted")
        assert max(error for error, _ in wrong) > 1e-3, wrong
        for name, found in rank.items():
            assert all(error < 1e-12 and more for error, more in found), (name, found)
