"""What the checks on a GPU share: a folder, what a check finds, small models sharded and not, and steps of training.

Every comparison also gives the error that it would have found with a planted one, so that each run shows on the machine
itself that it can fail.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOAT64, FLOAT32 = 1e-9, 1e-5
STEPS = 5
PLANTED = 1e-2
"""A planted error: this share of a number, or of the largest element of a tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a check found; nothing in it is compared where `worst` is None.

    Args:
        worst: the largest error.
        planted: the smallest error that its comparisons find when one number is wrong; it must be above the limit.
        figures: whatever else was measured, by name.
        absent: what the check needs and this machine does not have. Nothing was checked then.
    """

    worst: float | None = None
    planted: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    absent: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """The error of a comparison, and what it would be with a planted error."""

    worst: float
    planted: float

    @staticmethod
    def of_all(errors: Iterable[Error]) -> Error:
        """The largest error of several comparisons; a planted one must be noticed by each."""
        errors = list(errors)
        return Error(worst=largest(one.worst for one in errors), planted=min(one.planted for one in errors))

    def found(self, **figures: Any) -> Found:
        """What a check found, with its figures."""
        return Found(worst=self.worst, planted=self.planted, figures=figures)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Where a check works.

    Args:
        folder: that all ranks share.
        device: `cuda` or `cpu`.
        hidden: hidden size of the model that is loaded and timed.
        layers: its layers.
        plant: make one gradient of every sharded model wrong, so that a check fails which compares gradients.
    """

    folder: Path
    device: str
    hidden: int
    layers: int
    plant: bool = False

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """What `make` writes to a folder; the first rank calls it, the first time. A collective."""
        path = self.folder / name
        if (not dist.is_initialized() or dist.get_rank() == 0) and not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of ranks that were stopped
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(path)
        if dist.is_initialized():
            dist.barrier()
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A check by name.

    Args:
        name: how it is chosen, and its row on the page.
        function: called by every rank.
        topic: the heading on the page that it stands under.
        limit: the largest error that is right.
        seconds: the ranks are stopped when it takes longer.
        ranks: 2: two TP ranks that share the card, over gloo. 1: one rank, over NCCL where there is a card. 0: a
            process that starts its own.
        needs_cuda: it is of no use without a card.
        spoils: the card, or its memory, is of no use to the ranks after it; new ones are started.
        small: it runs in the small mode too.
        hybrid: the family of `benchmarks.gpu.hybrids` whose rules it waits for.
    """

    name: str
    function: Callable[[Work], Found]
    topic: str
    limit: float | None = None
    seconds: float = 30.0
    ranks: int = 2
    needs_cuda: bool = False
    spoils: bool = False
    small: bool = False
    hybrid: str = ""


def largest(errors: Iterable[float]) -> float:
    """The largest of errors; one that is not a number is larger than all."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def relative(found: list[float], expected: list[float], planted: float = PLANTED) -> Error:
    """The largest relative error; planted is one in the last number."""

    def worst(numbers: list[float]) -> float:
        return largest(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(numbers, expected, strict=True))

    return Error(worst=worst(found), planted=worst([*found[:-1], found[-1] * (1 + planted)]))


def absolute(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Error:
    """The largest absolute difference of tensors by name; planted is one in one element of one of them."""
    assert found.keys() == expected.keys(), f"other tensors: {sorted(found.keys() ^ expected.keys())}"

    def worst(tensors: dict[str, Tensor]) -> float:
        return largest((tensors[name].double() - value.double()).abs().max().item() for name, value in expected.items())

    return Error(worst=worst(found), planted=worst(spoiled(found, min(found))))


def spoiled(tensors: dict[str, Tensor], name: str, planted: float = PLANTED) -> dict[str, Tensor]:
    """The tensors, every element of one of them off by a share of its largest."""
    wrong = tensors[name] + planted * tensors[name].abs().max()
    return {**tensors, name: wrong}


def checkpoint(work: Work, variant: str, **changes: Any) -> Path:
    """A small random checkpoint of a family."""
    from tests.helpers.models import save_checkpoint

    name = "-".join([variant, *changes])
    return work.once(name, lambda path: save_checkpoint(path, variant, **changes))


def sharded(work: Work, variant: str, *, changes: Any = None, planned: Any = None, **options: Any) -> Any:
    """A plan, and this rank's model in training mode, from shards.

    Args:
        work: where.
        variant: a family.
        changes: of its config, by name.
        planned: arguments of `compile_plan`.
        **options: for `load_model`.
    """
    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.runtime import TrainingPlan

    folder = checkpoint(work, variant, **(changes or {}))
    plan = TrainingPlan(compile_plan(folder, tp_size=dist.get_world_size(), **(planned or {})))
    name = ".".join([folder.name, f"tp{dist.get_world_size()}", *(planned or {})])
    shards = work.once(name, lambda path: presplit(plan.document, folder, path))
    return plan, planted_in(work, plan.load_model(shards, **options).train())


def planted_in(work: Work, model: Any) -> Any:
    """The model, whose first gradient is wrong if an error is to be planted."""
    if work.plant:
        first = next(value for value in model.parameters() if value.requires_grad)
        first.register_hook(lambda gradient: gradient + PLANTED * gradient.abs().max())
    return model


def dense(work: Work, variant: str, dtype: torch.dtype = torch.float32, changes: Any = None, **options: Any) -> Any:
    """The unsharded model on the same device, in training mode."""
    from tests.helpers.models import load_dense

    return load_dense(checkpoint(work, variant, **(changes or {})), dtype, **options).to(work.device)


def batches(work: Work) -> Callable[[int], Tensor]:
    """Token ids by seed, on the device."""
    from tests.helpers.models import batch

    return lambda seed: batch(seed).to(work.device)


def adam_losses(work: Work, model: Any, optimizer: Any = None) -> list[float]:
    """Losses of steps of AdamW, or of another optimizer, without an engine."""
    tokens = batches(work)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2, eps=1e-5)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=tokens(step), labels=tokens(step), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses
