"""Dropout under tensor parallelism: the same masks on what every rank has whole, different ones on what is cut.

All ranks of a TP group run on one random stream. Between a column-parallel layer and the row-parallel one that takes
its output they leave it: each continues on a stream of its own, seeded by a number drawn from the common one and by its
rank. Nothing else is kept, so restoring the common stream (as activation checkpointing does) restores the masks.

Recomputing activations may stop inside a region. Such a region is over when a layer of another module enters one, or
the layer that entered it enters again.
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
    """The layer that took this process into a cut region, None outside of one, and the common stream to go back to."""

    opened_by: str | None = None
    group: Any = None
    checked: bool = False
    saved: list[torch.Tensor] = field(default_factory=list)


_region = _Region()


def use_cut_regions(group: Any) -> None:
    """Switch streams from now on, with a common one for the TP `group`; a model without dropout has no need to."""
    _region.group = group
    _synchronise(group)


def has_dropout(model: nn.Module) -> bool:
    """Whether any module of `model` drops out: an `nn.Dropout`, or an attribute such as `attention_dropout`."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any("drop" in name and type(value) is float and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


def _synchronise(group: Any) -> None:
    """Give all ranks of a TP group the common stream of the first of them."""
    device = torch.device(get_accelerator().current_device_name())
    seed = torch.randint(_LARGEST_SEED, (), dtype=torch.int64).to(device)
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    torch.manual_seed(int(seed))


def enter_cut_region(layer: str, tp_rank: int) -> None:
    """Continue on this rank's own stream, from the layer called `layer` on. In the region of its module: nothing."""
    if _region.group is None or _is_inside(layer):
        return
    seed = int(torch.randint(_LARGEST_SEED, ()))
    if not _region.checked:
        _check_common(seed)
    _region.saved = [torch.get_rng_state()]
    if get_accelerator().device_name() != "cpu":
        _region.saved.append(get_accelerator().get_rng_state())
    _region.opened_by = layer
    torch.manual_seed((seed + tp_rank) % _LARGEST_SEED)


def leave_cut_region() -> None:
    """Back to the common stream. Outside of a region: nothing."""
    if _region.opened_by is None:
        return
    torch.set_rng_state(_region.saved[0])
    if len(_region.saved) > 1:
        get_accelerator().set_rng_state(_region.saved[1])
    _region.opened_by = None


def _check_common(seed: int) -> None:
    """Once: the ranks of a TP group must be on one stream, which a seed of each rank's own after loading ends."""
    device = torch.device(get_accelerator().current_device_name())
    ends = torch.tensor([seed, -seed], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=_region.group)
    if ends[0] != -ends[1]:
        raise RuntimeError(
            "The ranks of a TP group draw different random numbers, and would drop out different parts of what they "
            "all hold. Got: different seeds on ranks of one TP group. Expected: one seed for all ranks of a group. "
            "Next: seed by plan.ranks.dp_rank, not by the global rank."
        )
    _region.checked = True


def _is_inside(layer: str) -> bool:
    opened_by = _region.opened_by
    return opened_by is not None and opened_by != layer and opened_by.rpartition(".")[0] == layer.rpartition(".")[0]
