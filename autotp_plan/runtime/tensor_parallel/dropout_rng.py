"""Dropout under tensor parallelism: equal masks on replicated activations, different ones on sharded activations.

The ranks of a TP group draw the same random numbers. Between a column-parallel layer and the row-parallel layer that
takes its output, the sharded region, each draws others: it is seeded by a number drawn before and by its rank. Nothing
else is kept, so restoring the random state from before the region (as activation checkpointing does) restores the
masks.

Recomputing activations may stop inside a region. Such a region ends when a layer of another module enters one, or the
layer that entered it enters again.
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
    """The layer that entered the sharded region, None outside of one, and the random state to restore after it."""

    opened_by: str | None = None
    group: Any = None
    saved: list[torch.Tensor] = field(default_factory=list)


_region = _Region()


def use_sharded_regions(group: Any) -> None:
    """Seed the ranks of a TP group equally, and switch seeds at sharded regions from now on.

    A model without dropout has no need of it.

    Args:
        group: the TP process group.
    """
    _region.group = group
    _synchronise(group)


_DROPOUT_WORDS = frozenset({"dropout", "pdrop", "drop", "layerdrop", "droppath"})
"""Words of attributes that hold a probability to drop: `attention_dropout`, `attn_dropout_p`, `resid_pdrop`."""


def has_dropout(model: nn.Module) -> bool:
    """Whether any module of `model` drops out.

    Those are torch's dropout modules with `p` above zero, and modules with a float above zero in an attribute one of
    whose words (between underscores) is a word for dropout. transformers' attention modules hold their probability so,
    and give it to functions.
    """
    return any(
        (isinstance(module, _DROPOUT_MODULES) and module.p > 0)
        or any(type(value) is float and value > 0 and _names_dropout(name) for name, value in vars(module).items())
        for module in model.modules()
    )


_DROPOUT_MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def _names_dropout(attribute: str) -> bool:
    return not _DROPOUT_WORDS.isdisjoint(attribute.lower().split("_"))


def _synchronise(group: Any) -> None:
    """Seed all ranks of a TP group by a number that the first of them draws."""
    device = torch.device(get_accelerator().current_device_name())
    seed = torch.randint(_LARGEST_SEED, (), dtype=torch.int64).to(device)
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    torch.manual_seed(int(seed))


def enter_sharded_region(layer: str, tp_rank: int) -> None:
    """Draw other random numbers than the other ranks from now on; inside a region of the layer's module, do nothing.

    Args:
        layer: the name of the layer, in its model.
        tp_rank: this rank.
    """
    if _region.group is None or _is_inside(layer):
        return
    seed = int(torch.randint(_LARGEST_SEED, ()))
    _region.saved = [torch.get_rng_state()]
    if get_accelerator().device_name() != "cpu":
        _region.saved.append(get_accelerator().get_rng_state())
    _region.opened_by = layer
    torch.manual_seed((seed + tp_rank) % _LARGEST_SEED)


def leave_sharded_region() -> None:
    """Draw the same random numbers as the other ranks again; outside of a region, do nothing."""
    if _region.opened_by is None:
        return
    torch.set_rng_state(_region.saved[0])
    if len(_region.saved) > 1:
        get_accelerator().set_rng_state(_region.saved[1])
    _region.opened_by = None


def _is_inside(layer: str) -> bool:
    opened_by = _region.opened_by
    return opened_by is not None and opened_by != layer and opened_by.rpartition(".")[0] == layer.rpartition(".")[0]
