"""What ranks send each other, counted; and models of one plan, loaded with communication saved and without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SWITCHES = {"on": True, "off": False}
WORDS = 257
"""The vocabulary: a size that no other dimension has, and that two ranks cannot halve."""


def prepare(work: Path, variant: str, **changes: Any) -> None:
    """`variant/`, `variant.json` at TP=2, and the dense model's numbers in `variant.dense`."""
    import torch

    from autotp_plan.planner import compile_plan
    from tests.helpers import parity
    from tests.helpers.models import eager_experts, load_dense, save_checkpoint

    folder = save_checkpoint(work / variant, variant, **changes)
    (work / f"{variant}.json").write_text(compile_plan(folder, tp_size=2).to_json())
    dense = load_dense(folder, torch.float64, **eager_experts(torch.float64))
    torch.save(parity.gradients(dense), work / f"{variant}.dense")


def load(work: Path, variant: str, on: bool = True, **options: Any) -> Any:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import eager_experts

    options = {"dtype": torch.float64, **eager_experts(torch.float64), **options}
    plan = load_plan(work / f"{variant}.json")
    return plan, plan.load_model(
        work / variant, share_input_gradients=on, vocab_parallel_loss=on, **options
    ).train()  # fmt: skip


@contextlib.contextmanager
def all_reduces() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what is all-reduced meanwhile."""
    from deepspeed import comm as dist

    shapes: list[tuple[int, ...]] = []
    real = dist.all_reduce

    def recording(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = recording
    try:
        yield shapes
    finally:
        dist.all_reduce = real


@contextlib.contextmanager
def planted(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    right = owner.__dict__[name]
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)
