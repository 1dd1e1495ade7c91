"""The parameters of one module that the plan shards: held, filled, gathered, and marked for DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.affine import AffinePiece, ParamAffineMap, replicated_map
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.internals import (
    count_gradient_on_every_rank,
    count_on_first_rank_only,
    describe_for_universal_checkpoint,
    mark_as_shard,
)
from autotp_plan.runtime.parameters.partly_replicated import (
    HeldParameter,
    held_parameters,
    join_held,
    slice_held,
)
from autotp_plan.runtime.parameters.shard_registry import ShardInfo, remember_shard
from autotp_plan.runtime.parameters.state_dicts import refuse_state_dict, shard_full_tensors
from autotp_plan.runtime.tensor_parallel.collectives import gather_shards, take
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, parameter_shape


class ShardedParams:
    """How a module holds this rank's shards of its parameters.

    It does not know the module itself, which its methods are given.

    Args:
        layouts: the layout of each of its parameters that the plan shards, and of the biases that go with them.
        shapes: the full shape of each.
        partition_type: `column` or `row`, for DeepSpeed's universal checkpoint.
        group: the TP process group.
    """

    def __init__(
        self,
        *,
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
        partition_type: str,
        group: Any,
    ) -> None:
        self.group, self.partition_type = group, partition_type
        self.tp_rank, self.tp_world_size = dist.get_rank(group), dist.get_world_size(group)
        self.layouts, self.shapes = dict(layouts), dict(shapes)
        self.held = {name: held_parameters(name, layouts[name], shapes[name], self.tp_rank) for name in layouts}

    def __deepcopy__(self, memo: Any) -> ShardedParams:
        return self  # never changed; and a process group cannot be copied

    def replace(self, module: nn.Module, name: str, full: nn.Parameter) -> None:
        """Replace the full parameter by empty ones of this rank's sizes, on meta."""
        for one in self.held[name]:
            shape = parameter_shape(one.shape, one.layout.shape, one.layout.rank_shape(self.tp_rank))
            empty = torch.empty(shape, dtype=full.dtype, device="meta")
            module.register_parameter(one.name, nn.Parameter(empty, requires_grad=full.requires_grad))

    def assign(self, module: nn.Module, name: str, shard: Tensor) -> None:
        """Fill the parameter `name` of the plan with this rank's shard of it."""
        for one in self.held[name]:
            empty = tensor_of(module, one.name)
            part = slice_held(one, shard, self.layouts[name], self.tp_rank)
            assert part.shape == empty.shape, f"{one.name}: {part.shape} for {empty.shape}"
            trains = empty.requires_grad and part.is_floating_point()
            module.register_parameter(one.name, nn.Parameter(part, requires_grad=trains))

    def gradient(self, module: nn.Module, name: str) -> Tensor | None:
        """The gradient of this rank's shard of `name`, None when it has none."""
        found = [tensor_of(module, one.name).grad for one in self.held[name]]
        return None if any(gradient is None for gradient in found) else self._joined(name, found)

    def shard(self, module: nn.Module, name: str) -> Tensor:
        """This rank's shard of `name`, put together from the parameters that hold it."""
        return self._joined(name, [tensor_of(module, one.name) for one in self.held[name]])

    def _joined(self, name: str, found: Sequence[Tensor]) -> Tensor:
        return join_held(self.held[name], found, self.layouts[name], self.shapes[name], self.tp_rank)

    def finish(self, module: nn.Module) -> None:
        """Prepare a module whose parameters are loaded: its parameters for DeepSpeed, its state dict for everyone."""
        self.finish_parameters(module)
        if self.tp_world_size > 1 and any(layout.dim is not None for layout in self.layouts.values()):
            module.register_state_dict_pre_hook(self._before_state_dict)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(self._before_load_state_dict)  # type: ignore[no-untyped-call]

    def _before_state_dict(self, *args: Any) -> None:
        refuse_state_dict(self, *args)

    def _before_load_state_dict(self, *args: Any) -> None:
        shard_full_tensors(self, *args)

    def take(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of the full tensor of `name`."""
        layout, shape = self.layouts[name], self.shapes[name]
        if layout.dim is None:
            return full
        shard = take(full.reshape(layout.shape), layout.intervals[self.tp_rank], layout.dim)
        return shard.reshape(parameter_shape(shape, layout.shape, shard.shape))

    def finish_parameters(self, module: nn.Module) -> None:
        """Tell DeepSpeed about the loaded parameters: which are shards, how they are gathered and sharded again."""
        for name, held in self.held.items():
            for one in held:
                parameter = tensor_of(module, one.name)
                if one.layout.dim is not None:
                    mark_as_shard(parameter, partial(self.gather_params, module), partial(self.shard_params, module))
                    with takes_hooks(parameter):
                        self._register_hooks(parameter, one.layout)
                self._describe(parameter, name, one)

    def _register_hooks(self, parameter: nn.Parameter, layout: Layout) -> None:
        """Sum a shard's gradient over the ranks that hold the same, and count it in the norm on the first of them."""
        groups = iv.replica_groups(layout.intervals)
        assert groups is not None, "the indices of a held parameter are replicated together or not at all"
        replicas = next(ranks for ranks in groups if self.tp_rank in ranks)
        if len(groups) < self.tp_world_size:  # on every rank, also those that share nothing: it is a collective
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(_sum_over_replicas, layout=layout, tp_rank=self.tp_rank, group=self.group)
            )
        is_first = self.tp_rank == replicas[0]
        remember_shard(parameter, ShardInfo(group=self.group, tp_rank=self.tp_rank, is_counted=is_first))
        if is_first:
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                count_gradient_on_every_rank
            )
        else:
            count_on_first_rank_only(parameter)

    def _describe(self, parameter: nn.Parameter, name: str, one: HeldParameter) -> None:
        layout = one.layout
        describe_for_universal_checkpoint(
            parameter,
            tp_size=self.tp_world_size,
            partition_type=self.partition_type,
            dim=layout.dim,
            logical_shape=layout.shape,
            output_shape=(self.shapes.get("weight", one.shape)[0],),
            shape=one.shape,
            sizes=[iv.length(rank) for rank in layout.intervals] or None,
            is_bias=name == "bias",
            affine_map=affine_map(layout, self.tp_world_size),
        )

    @torch.no_grad()
    def gather_params(self, module: nn.Module, params_list: list[Any]) -> None:
        """Replace the data of sharded parameters by the full ones. DeepSpeed calls it when it saves."""
        for parameter, one, dim in self._sharded(module, params_list):
            local = parameter.data.view(one.layout.rank_shape(self.tp_rank))
            if self.tp_world_size > 1:
                local = gather_shards(local, self.group, one.layout.intervals, dim)
            parameter.data = local.reshape(one.shape)

    @torch.no_grad()
    def shard_params(self, module: nn.Module, params_list: list[Any]) -> None:
        """Replace the data of full parameters by this rank's shards. The reverse of `gather_params`."""
        for parameter, one, dim in self._sharded(module, params_list):
            shard = take(parameter.data.view(one.layout.shape), one.layout.intervals[self.tp_rank], dim)
            parameter.data = shard.view(parameter_shape(one.shape, one.layout.shape, shard.shape))

    def _sharded(self, module: nn.Module, params_list: list[Any]) -> Iterator[tuple[Any, HeldParameter, int]]:
        """`(parameter, how it is held, dim)` of those of `params_list` that this module holds shards in."""
        ours = {id(tensor_of(module, one.name)): one for held in self.held.values() for one in held}
        for parameter in params_list:
            one = ours.get(id(parameter))
            if one is not None and one.layout.dim is not None:
                yield parameter, one, one.layout.dim


def _sum_over_replicas(gradient: Tensor, layout: Layout, tp_rank: int, group: Any) -> Tensor:
    """The sum of a shard's gradients over the ranks that hold it, each of which computed part of it.

    Every rank adds it to a gradient of the full parameter, which has the rows of all KV heads.
    """
    assert layout.dim is not None
    full = gradient.new_zeros(layout.shape)
    local = gradient.reshape(layout.rank_shape(tp_rank))
    size = layout.shape[layout.dim]
    for at, to, count in iv.copies(layout.intervals[tp_rank], ((0, size),)):
        full.narrow(layout.dim, to, count).copy_(local.narrow(layout.dim, at, count))
    dist.all_reduce(full, group=group)
    return take(full, layout.intervals[tp_rank], layout.dim).view_as(gradient)


def affine_map(layout: Layout, tp_size: int) -> ParamAffineMap:
    """A layout in the form of DeepSpeed's universal checkpoint (deepspeed/checkpoint/affine.py): strided views.

    Each view is held by one set of ranks, so intervals are split where the set changes.
    """
    if layout.dim is None:
        return replicated_map(layout.shape, tp_size)
    strides = _strides(layout.shape)
    shard_shapes = {rank: layout.rank_shape(rank) for rank in range(tp_size)}
    pieces: dict[int, list[AffinePiece]] = {rank: [] for rank in range(tp_size)}
    for interval, ranks in iv.holders(layout.intervals):
        for rank in ranks:
            for start, at, count in iv.copies((interval,), layout.intervals[rank]):
                shape = (*layout.shape[: layout.dim], count, *layout.shape[layout.dim + 1 :])
                local = _strides(shard_shapes[rank])
                pieces[rank].append(
                    AffinePiece(
                        shape=shape,
                        source_offset=(interval[0] + start) * strides[layout.dim],
                        source_strides=strides,
                        dest_offset=at * local[layout.dim],
                        dest_strides=local,
                        locations=ranks,
                    )
                )
    return ParamAffineMap(logical_shape=layout.shape, shard_shapes=shard_shapes, pieces_by_rank=pieces)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


@contextlib.contextmanager
def takes_hooks(parameter: nn.Parameter) -> Iterator[None]:
    """While active, hooks for gradients can be registered, of one that is not trained now too."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(trained)
