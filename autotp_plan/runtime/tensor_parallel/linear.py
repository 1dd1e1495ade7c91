"""Column- and row-parallel linear layers, and the base class of all tensor-parallel layers.

They subclass DeepSpeed's `TensorParallel_Layer`, so that its consolidated saving and universal checkpoint can put the
shards together, but take every size from the plan's layouts, where DeepSpeed's subclasses derive theirs from names and
head counts. A layer is built with parameters on the meta device; `finish` marks them once they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor, nn

from autotp_plan.probes.linear import orientation
from autotp_plan.runtime.deepspeed.internals import ShardedLayer, are_all_of_deepspeed
from autotp_plan.runtime.parameters.state_dicts import HoldsShards
from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks, given_product, sum_over_ranks, take
from autotp_plan.runtime.tensor_parallel.dropout_rng import enter_sharded_region, leave_sharded_region
from autotp_plan.runtime.tensor_parallel.gathered_weight import GatheredWeight, ShardedWeight, are_shards_shown
from autotp_plan.runtime.tensor_parallel.lazy_logits import Deferred, LastDimSharding, LazilyGathered
from autotp_plan.runtime.tensor_parallel.sharded_params import ShardedParams
from autotp_plan.runtime.tensor_parallel.torch_internals import eager, forward_pre_hooks, tensor_of
from autotp_plan.runtime.tensor_parallel.weight_reads import watched
from autotp_plan.schemas.layout import Layout

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function of an input, a weight `(out_features, in_features)` and a bias."""


class SequenceStream(Protocol):
    """A residual stream that may be sharded along the sequence: `shape` is None where it is not."""

    shape: Any

    def product(self, input: Tensor, weight: Tensor, *, overlap: bool) -> Tensor:
        """This rank's tokens of the sum over the ranks of a row-parallel product."""


class PlannedLayer(HoldsShards, ShardedLayer):
    """A module whose `weight` (and `bias`) are one rank's shards by a layout.

    Args:
        module: the module it replaces; only its parameters' dtypes and options are read.
        name: its name in the model.
        layouts: the layout of `weight`, and of `bias` where there is one.
        shapes: the full shape of each.
        group: the TP process group.
    """

    share_input_gradients: bool = True
    """All-reduce the gradient of an input once for all layers that take it, not once for each."""
    partition_type: ClassVar[str]

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
        group: Any,
    ) -> None:
        super().__init__(group, name)
        self.shards = ShardedParams(layouts=layouts, shapes=shapes, partition_type=self.partition_type, group=group)
        for leaf in ("weight", "bias"):
            full = getattr(module, leaf, None)
            if full is None:
                self.register_parameter(leaf, None)
            else:
                self.shards.replace(self, leaf, full)

    def gather_params(self, params_list: list[Any]) -> None:
        """Replace the data of sharded parameters by the full ones. DeepSpeed calls it when it saves."""
        self.shards.gather_params(self, params_list)

    def shard_params(self, params_list: list[Any]) -> None:
        """Replace the data of full parameters by this rank's shards. The reverse of `gather_params`."""
        self.shards.shard_params(self, params_list)

    def held_shards(self) -> ShardedParams:
        return self.shards

    @property
    def weight(self) -> Any:
        """The parameter `weight`; of a layer that `gathers_when_read`, the full weight instead of this rank's shard."""
        found = self._read("weight", torch.compiler.is_compiling())
        return found if self.gathers_when_read else watched(self, f"{self.name}.weight", found)

    @property
    def bias(self) -> Any:
        """The parameter `bias`, or None; as `weight`."""
        return self._read("bias", torch.compiler.is_compiling())

    @property
    def gathers_when_read(self) -> bool:
        """Whether others read the full weight: of layers with words of the vocabulary, which a loss may multiply by."""
        return False

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter itself, this rank's shard."""
        parameter = tensor_of(self, target)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @eager
    def _read(self, leaf: str, at_once: bool) -> Any:
        parameter = tensor_of(self, leaf)
        if parameter is None or not (self.gathers_when_read and self.is_tp_parallel) or parameter.is_meta:
            return parameter
        if are_shards_shown():
            return parameter
        layout = self.shards.layouts[leaf]
        if layout.dim is None:
            return parameter
        sharded = ShardedWeight(
            name=f"{self.name}.{leaf}",
            parameter=parameter,
            shard=partial(self.shards.shard, self, leaf),
            layout=layout,
            shape=self.shards.shapes[leaf],
            group=self.mp_group,
            tp_rank=self.tp_index,
        )
        weight = GatheredWeight.of(sharded)
        return weight.gathered() if at_once else weight  # torch.compile asks for strides, which it has not before

    @property
    def local_weight(self) -> Tensor:
        """This rank's shard of the weight, as `F.linear` takes it: `(out_features, in_features)`."""
        return self.shards.shard(self, "weight")

    @property
    def local_bias(self) -> Tensor | None:
        """This rank's shard of the bias."""
        return None if tensor_of(self, "bias") is None else self.shards.shard(self, "bias")


class _Linear(PlannedLayer):
    """What column- and row-parallel layers share: their sizes, and whether the weight is transposed, as in a Conv1D."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.transposed = orientation(module) == "transposed"
        first, second = self.shards.shapes["weight"]
        self.out_features, self.in_features = (second, first) if self.transposed else (first, second)

    @property
    def local_weight(self) -> Tensor:
        weight = self.shards.shard(self, "weight")
        return weight.t() if self.transposed else weight


class ColumnParallelLinear(_Linear):
    """A linear layer sharded by output features. `gather_output` all-gathers the output.

    While `defer_gather` is set, that all-gather is deferred to the first use of the output. While `defer_product` is
    set, the layer returns what that makes of its input, and computes nothing.
    """

    partition_type = "column"

    def __init__(self, module: nn.Module, *, gather_output: bool = False, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.gather_output = gather_output
        self.defer_gather = False
        self.defer_product: Callable[[Tensor], Tensor] | None = None

    @property
    def gathers_when_read(self) -> bool:
        """Whether others read the full weight, as the layer's output is gathered too."""
        return self.gather_output

    @eager
    def __call__(self, input: Tensor, *, compute: Compute | None = None) -> Tensor:
        """As any module's, but with `copy_to_ranks` before the hooks of ZeRO 3.

        Those give every module another tensor as input, and layers that take the same one would no longer share its
        gradient. Hooks of others come first, as they may change the input.

        Args:
            input: `(..., in_features)`.
            compute: what to compute of the input, this rank's shard of the weight and of the bias, in place of the
                product; it returns a tensor. The gradient of its input is all-reduced.
        """
        output: Tensor
        if self.defer_product is not None and compute is None:
            return self.defer_product(input)
        if are_all_of_deepspeed(forward_pre_hooks(self)):
            output = super().__call__(self._copied(input, compute is not None), is_copied=True, compute=compute)
        else:
            output = super().__call__(input, compute=compute)
        return output

    def forward(self, input: Tensor, *, is_copied: bool = False, compute: Compute | None = None) -> Tensor:
        """`(..., in_features)` to this rank's part of `(..., out_features)`, or to all of it when gathered."""
        weight, bias = self.local_weight, self.local_bias
        if compute is not None:
            return compute(input if is_copied else self._copied(input, True), weight, bias)
        if not self.is_tp_parallel:
            return F.linear(input, weight, bias)
        output: Tensor
        if self.overlaps_communication:
            output = overlapped_product(input, weight, bias, self.mp_group)
        else:
            output = F.linear(input if is_copied else self._copied(input), weight, bias)
        if self.gather_output:
            sharding = LastDimSharding(self.mp_group, self.shards.layouts["weight"].intervals, self.tp_index)
            return LazilyGathered.of(output, sharding) if self.defer_gather else sharding.gather(output)
        if self.training:
            enter_sharded_region(self.name, self.tp_index)
        return output

    def _copied(self, input: Tensor, always: bool = False) -> Tensor:
        overlaps = self.overlaps_communication and not always  # then `_OverlappedColumn` all-reduces
        if not self.is_tp_parallel or overlaps:
            return input
        return copy_to_ranks(input, self.mp_group, shared=self.share_input_gradients)


class RowParallelLinear(_Linear):
    """A linear layer sharded by input features; the bias is replicated and added once, after the all-reduce.

    With `split_input` the input is replicated, and each rank takes its part of it. With `copy_output` the output goes
    into sharded weights again, so its gradient is all-reduced too.
    """

    partition_type = "row"

    def __init__(self, module: nn.Module, *, split_input: bool = False, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.split_input = split_input
        self.copy_output = False
        self.stream: SequenceStream | None = None

    @eager
    def forward(self, input: Tensor) -> Tensor:
        """This rank's part of `(..., in_features)` to `(..., out_features)`, the same on every rank.

        With a `stream` that is sharded, to this rank's tokens of that.
        """
        if self.split_input and self.is_tp_parallel:
            held = self.shards.layouts["weight"].intervals[self.tp_index]
            copied = copy_to_ranks(input, self.mp_group, shared=self.share_input_gradients)
            input = take(copied, held, input.dim() - 1)
        output = self._summed_product(input) if self.is_tp_parallel else F.linear(input, self.local_weight)
        output = output if self.bias is None else output + self.bias
        if self.copy_output and self.is_tp_parallel:
            output = copy_to_ranks(output, self.mp_group, shared=self.share_input_gradients)
        return output

    def _summed_product(self, input: Tensor) -> Tensor:
        """The sum over the ranks of the product; behind it, other random numbers than in the sharded region."""
        stream = None if self.stream is None or self.stream.shape is None else self.stream
        if stream is None:
            output = sum_over_ranks(F.linear(input, self.local_weight), self.mp_group, is_product=True)
        else:
            output = stream.product(input, self.local_weight, overlap=self.overlaps_communication)
        if self.training:
            leave_sharded_region()
            if stream is not None:
                enter_sharded_region(f"{self.name}.stream", self.tp_index)
        return output


def overlapped_product(input: Tensor, weight: Tensor, bias: Tensor | None, group: Any) -> Tensor:
    """A column-parallel product whose input's gradient is summed while the weight's is computed."""
    if isinstance(input, Deferred):
        first = input.first_product(weight, bias)
        if first is not None:
            return first
        input = input.gathered()
    product = given_product(input, group) or partial(_OverlappedColumn.apply, group)
    output: Tensor = product(input, weight, bias)
    return output


class _OverlappedColumn(torch.autograd.Function):
    """Column-parallel linear whose input gradient is all-reduced while the weight gradient is computed."""

    @staticmethod
    def forward(ctx: Any, group: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.group = group
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        _, needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad_input = handle = None
        if needs_input:
            grad_input = grad_output.matmul(weight).contiguous()
            handle = dist.all_reduce(grad_input, group=ctx.group, async_op=True)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = rows.t().matmul(input.reshape(-1, input.shape[-1])) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        if handle is not None:
            handle.wait()
        return None, grad_input, grad_weight, grad_bias
