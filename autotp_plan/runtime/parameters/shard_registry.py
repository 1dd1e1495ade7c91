"""The parameters of this process that are shards, for code that is given parameters or gradients without their model.

Optimizers and gradient clipping see tensors only. Kept weakly: a model that is deleted is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What is known of a parameter that is a shard.

    Attributes:
        group: the TP process group.
        tp_rank: this process's rank in it.
        is_counted: whether this rank counts it in a sum over the full tensor: the first of those that hold the same.
    """

    group: Any
    tp_rank: int
    is_counted: bool


_shards: MutableMapping[Tensor, ShardInfo] = WeakTensorKeyDictionary()


def remember_shard(parameter: Tensor, info: ShardInfo) -> None:
    """Note that `parameter` is a shard."""
    _shards[parameter] = info


def is_shard(parameter: Tensor) -> bool:
    """Whether `parameter` is one rank's shard of a larger tensor."""
    return parameter in _shards


def shards_by_gradient(gradients: Iterable[Tensor]) -> dict[int, ShardInfo]:
    """What is known of those of `gradients` that belong to shards, by the `id` of the gradient."""
    wanted = {id(gradient) for gradient in gradients}
    found = {}
    for parameter, info in list(_shards.items()):
        if parameter.grad is not None and id(parameter.grad) in wanted:
            found[id(parameter.grad)] = info
    return found
