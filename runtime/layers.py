"""The tensor-parallel modules: their common base, and column- and row-parallel linear layers.

They subclass DeepSpeed's `TensorParallel_Layer`, so that its consolidated saving and universal checkpoint see shards
they can put together, but take every size from the plan's layouts: DeepSpeed's own subclasses work theirs out from
names and head counts. A layer is built with parameters on the meta device; `finish` marks them once they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.checkpoint.affine import AffinePiece, ParamAffineMap, replicated_map
from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL, TensorParallel_Layer
from torch import Tensor, nn

from autotp_plan.runtime.collectives import copy_to_ranks, gather_last_dim, gather_shards, sum_over_ranks, take
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, parameter_shape


class PlannedLayer(TensorParallel_Layer):  # type: ignore[misc]
    """A module whose `weight` (and `bias`) are one rank's shards by a layout.

    Args:
        module: the whole module it replaces; only its parameters' dtypes and options are read.
        layouts: the layout of `weight`, and of `bias` where there is one.
        shapes: the full shape of each.
        group: the TP process group.
    """

    partition_type: ClassVar[str]
    tp_index: int
    tp_world_size: int
    is_tp_parallel: bool

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
        group: Any,
    ) -> None:
        super().__init__(group, name=name)
        self.support_training = True
        self.layouts = dict(layouts)
        self.full_shapes = dict(shapes)
        self.weight = self._empty(module.weight, "weight")
        bias = getattr(module, "bias", None)
        self.bias = self._empty(bias, "bias") if bias is not None else None

    def _empty(self, whole: Any, name: str) -> nn.Parameter:
        layout = self.layouts[name]
        shape = parameter_shape(self.full_shapes[name], layout.shape, layout.rank_shape(self.tp_index))
        empty = torch.empty(shape, dtype=whole.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=whole.requires_grad)

    def finish(self) -> None:
        """Mark the loaded parameters for DeepSpeed: which are shards, how to gather and cut them again."""
        for name, layout in self.layouts.items():
            parameter = getattr(self, name)
            if layout.dim is not None:
                self.config_tp_params(parameter)
                self._share(parameter, layout)
        self._mark_uc_metadata()

    def _share(self, parameter: nn.Parameter, layout: Layout) -> None:
        """Sum a shard's gradient over the ranks that hold the same, and count it in the norm on the first of them."""
        groups = iv.replica_groups(layout.intervals)
        assert groups is not None, "check_model refuses shards that are shared in part"
        replicas = next(ranks for ranks in groups if self.tp_index in ranks)
        if len(groups) < self.tp_world_size:  # on every rank, also those that share nothing: it is a collective
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(_sum_over_replicas, layout=layout, tp_rank=self.tp_index, group=self.mp_group)
            )
        if self.tp_index == replicas[0]:
            parameter.register_post_accumulate_grad_hook(_mark_gradient)  # type: ignore[no-untyped-call]
        else:
            setattr(parameter, DS_TENSOR_MODEL_PARALLEL, False)

    @torch.no_grad()
    def gather_params(self, params_list: list[Any]) -> None:
        """Replace the data of cut parameters by the whole ones. Called by DeepSpeed when it saves."""
        for parameter, layout, dim, shape in self._cut_parameters(params_list):
            local = parameter.data.view(layout.rank_shape(self.tp_index))
            if self.is_tp_parallel:
                local = gather_shards(local, self.mp_group, layout.intervals, dim)
            parameter.data = local.reshape(shape)

    @torch.no_grad()
    def _tp_partition(self, params_list: list[Any]) -> None:
        """Replace the data of whole parameters by this rank's shards. The reverse of `gather_params`."""
        for parameter, layout, dim, shape in self._cut_parameters(params_list):
            shard = take(parameter.data.view(layout.shape), layout.intervals[self.tp_index], dim)
            parameter.data = shard.view(parameter_shape(shape, layout.shape, shard.shape))

    def _cut_parameters(self, params_list: list[Any]) -> Iterator[tuple[Any, Layout, int, tuple[int, ...]]]:
        """`(parameter, layout, dim, full shape)` of those of `params_list` that are ours and cut."""
        mine = {id(getattr(self, name)): name for name in self.layouts}
        for parameter in params_list:
            name = mine.get(id(parameter))
            if name is not None and (dim := self.layouts[name].dim) is not None:
                yield parameter, self.layouts[name], dim, self.full_shapes[name]

    def _mark_uc_metadata(self) -> None:
        for name, layout in self.layouts.items():
            parameter = getattr(self, name)
            shape = self.full_shapes[name]
            self._set_param_uc_meta(
                parameter,
                partition_type=self.partition_type,
                partition_dim=layout.dim,
                logical_shape=layout.shape,
                output_shape=(self.full_shapes["weight"][0],),
                partition_sizes=[iv.length(rank) for rank in layout.intervals] or None,
                target_partition_shape=self._shape_before_zero3_partition(parameter),
                original_shape=shape,
                is_bias=name == "bias",
                replicated=layout.dim is None,
                affine_map=affine_map(layout, self.tp_world_size),
            )


class ColumnParallelLinear(PlannedLayer):
    """A linear layer cut by output features. `gather_output` puts the whole output together on every rank."""

    partition_type = "column"

    def __init__(self, module: nn.Linear, *, gather_output: bool = False, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.gather_output = gather_output

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in_features)` to this rank's `(..., out_features)`, or to all of them when gathered."""
        if not self.is_tp_parallel:
            return F.linear(input, self.weight, self.bias)
        output: Tensor
        if self.__class__.tp_overlap_comm:
            output = _OverlappedColumn.apply(  # type: ignore[no-untyped-call]
                input, self.weight, self.bias, self.mp_group
            )
        else:
            output = F.linear(copy_to_ranks(input, self.mp_group), self.weight, self.bias)
        if self.gather_output:
            output = gather_last_dim(output, self.mp_group, self.layouts["weight"].intervals, self.tp_index)
        return output


class RowParallelLinear(PlannedLayer):
    """A linear layer cut by input features; the bias is whole and added once, after the sum."""

    partition_type = "row"

    def __init__(self, module: nn.Linear, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.in_features, self.out_features = module.in_features, module.out_features

    def forward(self, input: Tensor) -> Tensor:
        """This rank's `(..., in_features)` to `(..., out_features)`, whole on every rank."""
        output: Tensor = F.linear(input, self.weight)
        if self.is_tp_parallel:
            output = sum_over_ranks(output, self.mp_group)
        return output if self.bias is None else output + self.bias


def _sum_over_replicas(gradient: Tensor, layout: Layout, tp_rank: int, group: Any) -> Tensor:
    """The sum of a shard's gradients over the ranks that hold it, each of which computed part of it.

    Every rank adds its own to a gradient of the whole parameter, which has as many units as there are KV heads.
    """
    assert layout.dim is not None
    whole = gradient.new_zeros(layout.shape)
    local = gradient.reshape(layout.rank_shape(tp_rank))
    size = layout.shape[layout.dim]
    for at, to, count in iv.pieces(layout.intervals[tp_rank], ((0, size),)):
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


class _OverlappedColumn(torch.autograd.Function):
    """Column-parallel linear whose input gradient is summed while the weight gradient is computed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.group = group
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_input = handle = None
        if needs_input:
            grad_input = grad_output.matmul(weight).contiguous()
            handle = dist.all_reduce(grad_input, group=ctx.group, async_op=True)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = rows.t().matmul(input.reshape(-1, input.shape[-1])) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        if handle is not None:
            handle.wait()
        return grad_input, grad_weight, grad_bias, None


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
            for start, at, count in iv.pieces((run,), layout.intervals[rank]):
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
