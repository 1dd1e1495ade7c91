"""What a module's shards need to be, to DeepSpeed and to their replicas: marked, counted once, gathered, cut again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.affine import AffinePiece, ParamAffineMap, replicated_map
from deepspeed.module_inject.layers import (
    DS_IS_REPLACED_MODULE,
    DS_TENSOR_MODEL_PARALLEL,
    TensorParallel_Layer,
)
from torch import Tensor, nn

from autotp_plan.runtime.tensor_parallel.collectives import gather_shards, take
from autotp_plan.runtime.tensor_parallel.partly_replicated import Piece, cut_piece, join_pieces, split_shared
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, parameter_shape


class Shards:
    """The parameters of one module by their layouts.

    Knows how they are held, but not the module itself, which its methods are given.

    Args:
        layouts: the layout of each of its parameters that the plan cuts, and of the biases that go with them.
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
        self.pieces = {name: split_shared(name, layouts[name], shapes[name], self.tp_rank) for name in layouts}

    def __deepcopy__(self, memo: Any) -> Shards:
        return self  # never changed; and a process group cannot be copied

    def replace(self, module: nn.Module, name: str, whole: nn.Parameter) -> None:
        """Put empty parameters of this rank's sizes, on meta, in the place of the whole one."""
        for piece in self.pieces[name]:
            shape = parameter_shape(piece.shape, piece.layout.shape, piece.layout.rank_shape(self.tp_rank))
            empty = torch.empty(shape, dtype=whole.dtype, device="meta")
            module.register_parameter(piece.name, nn.Parameter(empty, requires_grad=whole.requires_grad))

    def assign(self, module: nn.Module, name: str, shard: Tensor) -> None:
        """Fill the parameter `name` of the plan with this rank's shard of it."""
        for piece in self.pieces[name]:
            empty = module._parameters[piece.name]
            assert empty is not None
            part = shard if len(self.pieces[name]) == 1 else cut_piece(piece, shard, self.layouts[name], self.tp_rank)
            assert part.shape == empty.shape, f"{piece.name}: {part.shape} for {empty.shape}"
            module._parameters[piece.name] = nn.Parameter(
                part, requires_grad=empty.requires_grad and part.is_floating_point()
            )

    def gradient(self, module: nn.Module, name: str) -> Tensor | None:
        """The gradient of this rank's shard of `name`, None when it has none."""
        found = [getattr(module, piece.name).grad for piece in self.pieces[name]]
        return None if any(one is None for one in found) else self._joined(name, found)

    def shard(self, module: nn.Module, name: str) -> Tensor:
        """This rank's shard of `name`, put together from the parameters that hold it."""
        return self._joined(name, [getattr(module, piece.name) for piece in self.pieces[name]])

    def _joined(self, name: str, found: Sequence[Tensor]) -> Tensor:
        return join_pieces(self.pieces[name], found, self.layouts[name], self.shapes[name], self.tp_rank)

    def finish(self, module: nn.Module) -> None:
        """Mark the loaded parameters for DeepSpeed: which are shards, how to gather and cut them again."""
        for name, pieces in self.pieces.items():
            for piece in pieces:
                parameter = getattr(module, piece.name)
                if piece.layout.dim is not None:
                    self._mark(module, parameter)
                    self._share(parameter, piece.layout)
                self._describe(parameter, name, piece)

    def _mark(self, module: nn.Module, parameter: Any) -> None:
        """As `TensorParallel_Layer.config_tp_params` does."""
        parameter.gather_params = partial(self.gather_params, module)
        parameter._tp_partition = partial(self.tp_partition, module)
        setattr(parameter, DS_TENSOR_MODEL_PARALLEL, True)
        setattr(parameter, DS_IS_REPLACED_MODULE, True)

    def _share(self, parameter: nn.Parameter, layout: Layout) -> None:
        """Sum a shard's gradient over the ranks that hold the same, and count it in the norm on the first of them."""
        groups = iv.replica_groups(layout.intervals)
        assert groups is not None, "a piece is shared whole or not at all"
        replicas = next(ranks for ranks in groups if self.tp_rank in ranks)
        if len(groups) < self.tp_world_size:  # on every rank, also those that share nothing: it is a collective
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(_sum_over_replicas, layout=layout, tp_rank=self.tp_rank, group=self.group)
            )
        if self.tp_rank == replicas[0]:
            parameter.register_post_accumulate_grad_hook(_mark_gradient)  # type: ignore[no-untyped-call]
        else:
            setattr(parameter, DS_TENSOR_MODEL_PARALLEL, False)

    def _describe(self, parameter: nn.Parameter, name: str, piece: Piece) -> None:
        """What DeepSpeed's universal checkpoint must know of a parameter."""
        layout = piece.layout
        TensorParallel_Layer._set_param_uc_meta(
            self,
            parameter,
            partition_type=self.partition_type,
            partition_dim=layout.dim,
            logical_shape=layout.shape,
            output_shape=(self.shapes.get("weight", piece.shape)[0],),
            partition_sizes=[iv.length(rank) for rank in layout.intervals] or None,
            target_partition_shape=TensorParallel_Layer._shape_before_zero3_partition(parameter),
            original_shape=piece.shape,
            is_bias=name == "bias",
            replicated=layout.dim is None,
            affine_map=affine_map(layout, self.tp_world_size),
        )

    @torch.no_grad()
    def gather_params(self, module: nn.Module, params_list: list[Any]) -> None:
        """Replace the data of cut parameters by the whole ones. Called by DeepSpeed when it saves."""
        for parameter, piece, dim in self._cut_parameters(module, params_list):
            local = parameter.data.view(piece.layout.rank_shape(self.tp_rank))
            if self.tp_world_size > 1:
                local = gather_shards(local, self.group, piece.layout.intervals, dim)
            parameter.data = local.reshape(piece.shape)

    @torch.no_grad()
    def tp_partition(self, module: nn.Module, params_list: list[Any]) -> None:
        """Replace the data of whole parameters by this rank's shards. The reverse of `gather_params`."""
        for parameter, piece, dim in self._cut_parameters(module, params_list):
            shard = take(parameter.data.view(piece.layout.shape), piece.layout.intervals[self.tp_rank], dim)
            parameter.data = shard.view(parameter_shape(piece.shape, piece.layout.shape, shard.shape))

    def _cut_parameters(self, module: nn.Module, params_list: list[Any]) -> Iterator[tuple[Any, Piece, int]]:
        """`(parameter, its piece, dim)` of those of `params_list` that are ours and cut."""
        mine = {id(getattr(module, piece.name)): piece for pieces in self.pieces.values() for piece in pieces}
        for parameter in params_list:
            piece = mine.get(id(parameter))
            if piece is not None and piece.layout.dim is not None:
                yield parameter, piece, piece.layout.dim


def _sum_over_replicas(gradient: Tensor, layout: Layout, tp_rank: int, group: Any) -> Tensor:
    """The sum of a shard's gradients over the ranks that hold it, each of which computed part of it.

    Every rank adds its own to a gradient of the whole parameter, which has as many units as there are KV heads.
    """
    assert layout.dim is not None
    whole = gradient.new_zeros(layout.shape)
    local = gradient.reshape(layout.rank_shape(tp_rank))
    size = layout.shape[layout.dim]
    for at, to, count in iv.copies(layout.intervals[tp_rank], ((0, size),)):
        whole.narrow(layout.dim, to, count).copy_(local.narrow(layout.dim, at, count))
    dist.all_reduce(whole, group=group)
    return take(whole, layout.intervals[tp_rank], layout.dim).view_as(gradient)


def _mark_gradient(parameter: nn.Parameter) -> None:
    """Mark the gradient of a shard as one, as its parameter is.

    DeepSpeed's optimizer wrapper for bf16 and fp16 without ZeRO (FP16_UnfusedOptimizer) takes the norm of gradients
    without their parameters, and would count those of rank 0 alone.
    """
    if parameter.grad is not None:
        setattr(parameter.grad, DS_TENSOR_MODEL_PARALLEL, True)


def affine_map(layout: Layout, tp_size: int) -> ParamAffineMap:
    """A layout in the words of DeepSpeed's universal checkpoint (deepspeed/checkpoint/affine.py): strided pieces.

    Every piece has one set of holders, so intervals are split where the holders change.
    """
    if layout.dim is None:
        return replicated_map(layout.shape, tp_size)
    strides = _strides(layout.shape)
    shard_shapes = {rank: layout.rank_shape(rank) for rank in range(tp_size)}
    pieces: dict[int, list[AffinePiece]] = {rank: [] for rank in range(tp_size)}
    for run, ranks in iv.holders(layout.intervals):
        for rank in ranks:
            for start, at, count in iv.copies((run,), layout.intervals[rank]):
                shape = (*layout.shape[: layout.dim], count, *layout.shape[layout.dim + 1 :])
                local = _strides(shard_shapes[rank])
                pieces[rank].append(
                    AffinePiece(
                        shape=shape,
                        source_offset=(run[0] + start) * strides[layout.dim],
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
