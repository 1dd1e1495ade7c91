"""The sharded parameters of a model as an optimizer needs them: layout, full shape, and the tensors of a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.runtime.loading.local_shard import shards_of
from autotp_plan.runtime.parameters.partly_replicated import HeldParameter, join_held, slice_held
from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, parameter_shape


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedWeight:
    """One parameter of the unsharded model, of which this rank holds a shard.

    Attributes:
        name: its name in the model.
        layout: which of its indices each rank holds.
        shape: its full shape.
        held: how this rank's shard is spread over `tensors`.
        tensors: what the optimizer steps for it: a parameter, or two where part of the shard is replicated.
        group: the TP process group.
        tp_rank: this process's rank in it.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    held: tuple[HeldParameter, ...]
    tensors: tuple[Tensor, ...]
    group: Any
    tp_rank: int

    def shard_numel(self, rank: int) -> int:
        """Number of elements of a rank's shard."""
        numel = 1
        for size in self.layout.rank_shape(rank):
            numel *= size
        return numel

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's shard, flat, of tensors (values or gradients) like `self.tensors`."""
        shard = join_held(self.held, tensors, self.layout, self.shape, self.tp_rank)
        return shard.reshape(-1)

    def split(self, shard: Tensor) -> list[Tensor]:
        """The reverse of `joined`."""
        view = self.layout.rank_shape(self.tp_rank)
        whole = shard.reshape(parameter_shape(self.shape, self.layout.shape, view))
        return [slice_held(one, whole, self.layout, self.tp_rank) for one in self.held]

    def full(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor of all ranks' flat shards."""
        dim = self.layout.dim
        assert dim is not None
        full = shards[0].new_empty(self.layout.shape)
        for rank, shard in enumerate(shards):
            local = shard.view(self.layout.rank_shape(rank))
            for start, at, count in iv.copies(self.layout.intervals[rank], ((0, self.layout.shape[dim]),)):
                full.narrow(dim, at, count).copy_(local.narrow(dim, start, count))
        return full.view(self.shape)

    def sub_parameters(self, full: Tensor) -> list[Tensor]:
        """The logical matrices of a full tensor, such as q, k and v: copies, or the tensor itself where it is one."""
        dim, sizes = self.layout.dim, [one.size for one in self.layout.sub_parameters]
        if len(sizes) < 2:
            return [full]
        assert dim is not None
        parts = torch.split(full.view(self.layout.shape), sizes, dim)
        return [part.reshape(parameter_shape(self.shape, self.layout.shape, part.shape)).clone() for part in parts]

    def joined_sub_parameters(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of `sub_parameters`."""
        if len(parts) == 1:
            return parts[0]
        dim, view = self.layout.dim, self.layout.shape
        assert dim is not None
        sizes = [one.size for one in self.layout.sub_parameters]
        views = [part.view(*view[:dim], size, *view[dim + 1 :]) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(views, dim).view(self.shape)

    def shard_of(self, full: Tensor, rank: int) -> Tensor:
        """A rank's flat shard of the full tensor."""
        assert self.layout.dim is not None
        return take(full.view(self.layout.shape), self.layout.intervals[rank], self.layout.dim).view(-1)


def sharded_weights(model: nn.Module, stepped: Mapping[int, Tensor] | None = None) -> list[ShardedWeight]:
    """The trainable parameters that a plan shards, in the order of their modules; each once, also where it is tied.

    Args:
        model: a model from `load_model`.
        stepped: by `id` of a parameter, the tensor that the optimizer steps in its place: a copy in float32. A
            parameter that is not in it is not stepped. None where the optimizer has the parameters themselves.
    """
    found: dict[int, ShardedWeight] = {}
    for name, module in model.named_modules():
        shards = shards_of(module)
        for leaf, layout in shards.layouts.items() if shards is not None else ():
            assert shards is not None
            if layout.dim is None:
                continue
            held = shards.held[leaf]
            parameters = [tensor_of(module, one.name) for one in held]
            is_stepped = stepped is None or all(id(one) in stepped for one in parameters)
            if id(parameters[0]) in found or not is_stepped or not parameters[0].requires_grad:
                continue
            found[id(parameters[0])] = ShardedWeight(
                name=f"{name}.{leaf}" if name else leaf,
                layout=layout,
                shape=shards.shapes[leaf],
                held=held,
                tensors=tuple(one if stepped is None else stepped[id(one)] for one in parameters),
                group=shards.group,
                tp_rank=shards.tp_rank,
            )
    return list(found.values())


def largest_first(weights: Sequence[ShardedWeight]) -> list[ShardedWeight]:
    """Sorted so that those next to each other are of similar size, and of one dtype; the same on every rank."""
    dtypes = {dtype: place for place, dtype in enumerate(dict.fromkeys(one.tensors[0].dtype for one in weights))}
    return sorted(weights, key=lambda one: (dtypes[one.tensors[0].dtype], -torch.Size(one.shape).numel()))
