"""`state_dict`, `load_state_dict`, pickling and copying of a module that holds shards.

A state dict with this rank's shards looks like one of the full model. So modules with shards refuse `state_dict`, also
inside a wrapper, but where the caller says that shards are wanted. `load_state_dict` takes full tensors and shards.
"""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from autotp_plan.runtime.parameters.partly_replicated import HeldParameter, slice_held
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.layout import Layout


class Shards(Protocol):
    """What is asked here of the sharded parameters of a module (`ShardedParams`)."""

    layouts: dict[str, Layout]
    shapes: dict[str, tuple[int, ...]]
    held: dict[str, tuple[HeldParameter, ...]]
    tp_rank: int
    tp_world_size: int

    def finish_parameters(self, module: nn.Module) -> None:
        """Tell DeepSpeed about the loaded parameters of `module`."""

    def take(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of the full tensor of `name`."""


WHOLE_MODEL = (
    "model.save_pretrained(folder) writes the full model, plan.save_shards(model, folder) its shards, "
    "plan.save_checkpoint(engine, folder) the job; autotp_plan.runtime.local_shard(model, name) is one shard. Every "
    "rank calls them"
)
"""What to call in the place of a state dict."""

_wanted: ContextVar[bool] = ContextVar("shards in state dicts", default=False)


@contextlib.contextmanager
def shards_in_state_dict() -> Iterator[None]:
    """While active, `state_dict()` of a sharded model gives this rank's shards, under the names of its parameters.

    A shard of which other ranks hold a part is two entries, `weight` and `weight_shared`. `load_state_dict` takes such
    a state dict back on the same rank of the same plan.
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


class NotPickled:
    """Pickling of a module of which this process has a part: refused; mixed into its class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MismatchError(
            Fault(
                what="a module that holds one rank's shards cannot be pickled",
                where=f"pickle or torch.save of {type(self).__name__}",
                got="one rank's part of the model, and its process groups",
                expected="tensors",
                next=WHOLE_MODEL,
            )
        )


class HoldsShards(NotPickled, nn.Module):
    """Pickling and copying of a module with shards; mixed into its class."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with the hooks and marks that its parameters need to train."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for key, value in vars(self).items():
            vars(new)[key] = value if key == "mp_group" else copy.deepcopy(value, memo)  # a group is not copied
        new.held_shards().finish_parameters(new)
        return new

    @abstractmethod
    def held_shards(self) -> Shards:
        """The sharded parameters of this module."""


def refuse_state_dict(shards: Shards, module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A hook for `module.state_dict`, which would hold shards.

    Raises:
        MismatchError: unless `shards_in_state_dict` is active.
    """
    if not _wanted.get():
        name = next(name for name, layout in shards.layouts.items() if layout.dim is not None)
        raise MismatchError(
            Fault(
                what="the state dict of a sharded model holds one rank's shards, not the model",
                where=f"state_dict(): {prefix}{name}",
                got=f"TP rank {shards.tp_rank} of {shards.tp_world_size}",
                expected="the full model",
                next=WHOLE_MODEL + ". For the shards themselves: with autotp_plan.runtime.shards_in_state_dict(): ...",
            )
        )


def shard_full_tensors(shards: Shards, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook for `module.load_state_dict`: replace full tensors in its copy of the dict by this rank's shards."""
    for name, held in shards.held.items():
        given = state_dict.get(prefix + name)
        layout, shape = shards.layouts[name], shards.shapes[name]
        if not isinstance(given, Tensor) or tuple(given.shape) != shape or layout.dim is None:
            continue
        shard = shards.take(name, given)
        for one in held:
            state_dict[prefix + one.name] = slice_held(one, shard, layout, shards.tp_rank)
