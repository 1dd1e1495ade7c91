"""What the checks on a GPU share: a folder, small models sharded and not, batches, and steps of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOAT64, FLOAT32 = 1e-9, 1e-5
STEPS = 5
Found = tuple[float | None, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A folder that both ranks share, the device, and the size of the model that is loaded and timed."""

    folder: Path
    device: str
    hidden: int
    layers: int

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """What `make` writes to a folder; the first rank calls it, the first time. A collective."""
        path = self.folder / name
        if dist.get_rank() == 0 and not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(path)
        dist.barrier()
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A check by name, the largest error that it allows, and whether it is of no use without a card."""

    name: str
    function: Callable[[Work], Found]
    limit: float | None = None
    needs_cuda: bool = False


def relative(found: list[float], expected: list[float]) -> float:
    """The largest relative error."""
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(found, expected, strict=True))


def checkpoint(work: Work, variant: str, **changes: Any) -> Path:
    """A small random checkpoint of a family."""
    from tests.helpers.models import save_checkpoint

    name = "-".join([variant, *changes])
    return work.once(name, lambda path: save_checkpoint(path, variant, **changes))


def sharded(work: Work, variant: str, *, from_shards: bool = True, changes: Any = None, **options: Any) -> Any:
    """A plan, and this rank's model in training mode."""
    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.runtime import TrainingPlan

    folder = checkpoint(work, variant, **(changes or {}))
    plan = TrainingPlan(compile_plan(folder, tp_size=dist.get_world_size()))
    if from_shards:
        folder = work.once(f"{folder.name}.shards", lambda path: presplit(plan.document, folder, path))
    return plan, plan.load_model(folder, **options).train()


def dense(work: Work, variant: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The unsharded model on the same device, in training mode."""
    from tests.helpers.models import load_dense

    return load_dense(checkpoint(work, variant), dtype, **options).to(work.device)


def batches(work: Work) -> Callable[[int], Tensor]:
    """Token ids by seed, on the device."""
    from tests.helpers.models import batch

    return lambda seed: batch(seed).to(work.device)


def adam_losses(work: Work, model: Any, optimizer: Any = None) -> list[float]:
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
