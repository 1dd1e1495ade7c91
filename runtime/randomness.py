"""Dropout under tensor parallelism: the same masks on what every rank has whole, different ones on what is cut.

All ranks of a TP group run on one random stream. Between a column-parallel layer and the row-parallel one that takes
its output they leave it: each continues on a stream of its own, seeded by a number drawn from the common one and by its
rank. Nothing else is kept, so restoring the common stream (as activation checkpointing does) restores the masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

_LARGEST_SEED = 2**62


@dataclass
class _Region:
    """Whether this process is inside a cut region, and the common stream to go back to."""

    active: bool = False
    wanted: bool = False
    saved: list[torch.Tensor] = field(default_factory=list)


_region = _Region()


def use_cut_regions(wanted: bool) -> None:
    """Switch streams from now on; a model without dropout has no need to."""
    _region.wanted = _region.wanted or wanted


def has_dropout(model: nn.Module) -> bool:
    """Whether any module of `model` drops out: an `nn.Dropout`, or an attribute such as `attention_dropout`."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any("drop" in name and type(value) is float and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


def synchronise(group: Any) -> None:
    """Give all ranks of a TP group the common stream of the first of them."""
    device = torch.device(get_accelerator().current_device_name())
    seed = torch.randint(_LARGEST_SEED, (), dtype=torch.int64).to(device)
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    torch.manual_seed(int(seed))


def enter_cut_region(tp_rank: int) -> None:
    """Continue on this rank's own stream. Inside a region: nothing."""
    if not _region.wanted or _region.active:
        return
    seed = int(torch.randint(_LARGEST_SEED, ()))
    _region.saved = [torch.get_rng_state()]
    if get_accelerator().device_name() != "cpu":
        _region.saved.append(get_accelerator().get_rng_state())
    _region.active = True
    torch.manual_seed((seed + tp_rank) % _LARGEST_SEED)


def leave_cut_region() -> None:
    """Back to the common stream. Outside of a region: nothing."""
    if not _region.active:
        return
    torch.set_rng_state(_region.saved[0])
    if len(_region.saved) > 1:
        get_accelerator().set_rng_state(_region.saved[1])
    _region.active = False
