"""The tensor-parallel modules: their common base, and column- and row-parallel linear layers.

They subclass DeepSpeed's `TensorParallel_Layer`, so that its consolidated saving and universal checkpoint see shards
they can put together, but take every size from the plan's layouts: DeepSpeed's own subclasses work theirs out from
names and head counts. A layer is built with parameters on the meta device; `finish` marks them once they are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.module_inject.layers import TensorParallel_Layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autotp_plan.runtime.tensor_parallel.collectives import copy_to_ranks, sum_over_ranks, take
from autotp_plan.runtime.tensor_parallel.dropout_rng import enter_cut_region, leave_cut_region
from autotp_plan.runtime.tensor_parallel.lazy_logits import GatheredWhenUsed, Parts
from autotp_plan.runtime.tensor_parallel.sharded_params import Shards
from autotp_plan.schemas.layout import Layout


class PlannedLayer(TensorParallel_Layer):  # type: ignore[misc]
    """A module whose `weight` (and `bias`) are one rank's shards by a layout.

    Args:
        module: the whole module it replaces; only its parameters' dtypes and options are read.
        layouts: the layout of `weight`, and of `bias` where there is one.
        shapes: the full shape of each.
        group: the TP process group.
    """

    share_input_gradients: bool = True
    """Sum the gradient of an input over the ranks once for all layers that take it, not once for each."""
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
        self.shards = Shards(layouts=layouts, shapes=shapes, partition_type=self.partition_type, group=group)
        for leaf in ("weight", "bias"):
            whole = getattr(module, leaf, None)
            if whole is None:
                self.register_parameter(leaf, None)
            else:
                self.shards.replace(self, leaf, whole)

    def gather_params(self, params_list: list[Any]) -> None:
        """Replace the data of cut parameters by the whole ones. Called by DeepSpeed when it saves."""
        self.shards.gather_params(self, params_list)

    def _tp_partition(self, params_list: list[Any]) -> None:
        self.shards.tp_partition(self, params_list)

    @property
    def local_weight(self) -> Tensor:
        """This rank's shard of the weight, as `F.linear` takes it: `(out_features, in_features)`."""
        return self.shards.shard(self, "weight")

    @property
    def local_bias(self) -> Tensor | None:
        """This rank's shard of the bias."""
        return None if self.bias is None else self.shards.shard(self, "bias")


class _Linear(PlannedLayer):
    """What column- and row-parallel layers share: the sizes, and which way the weight lies (transposed in a Conv1D)."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.transposed = isinstance(module, Conv1D)
        first, second = self.shards.shapes["weight"]
        self.out_features, self.in_features = (second, first) if self.transposed else (first, second)

    @property
    def local_weight(self) -> Tensor:
        weight = self.shards.shard(self, "weight")
        return weight.t() if self.transposed else weight


class ColumnParallelLinear(_Linear):
    """A linear layer cut by output features. `gather_output` puts the whole output together on every rank."""

    partition_type = "column"

    def __init__(self, module: nn.Module, *, gather_output: bool = False, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.gather_output = gather_output
        self.gather_when_used = False

    def __call__(self, input: Tensor) -> Tensor:
        """As any module's. But ZeRO 3's hooks give every module an input of its own, by which layers that take the
        same one would no longer know it: then it is copied before them. Not before hooks of others, which may add to
        it what has gradients of its own.
        """
        hooks = self._forward_pre_hooks.values()
        output: Tensor
        if hooks and all(getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks):
            output = super().__call__(self._copied(input), is_copied=True)
        else:
            output = super().__call__(input)
        return output

    def forward(self, input: Tensor, *, is_copied: bool = False) -> Tensor:
        """`(..., in_features)` to this rank's `(..., out_features)`, or to all of them when gathered.

        While `gather_when_used` is set, what is to be gathered is so by whoever uses it.
        """
        weight, bias = self.local_weight, self.local_bias
        if not self.is_tp_parallel:
            return F.linear(input, weight, bias)
        output: Tensor
        if self.__class__.tp_overlap_comm:
            output = _OverlappedColumn.apply(input, weight, bias, self.mp_group)  # type: ignore[no-untyped-call]
        else:
            output = F.linear(input if is_copied else self._copied(input), weight, bias)
        if self.gather_output:
            parts = Parts(self.mp_group, self.shards.layouts["weight"].intervals, self.tp_index)
            return GatheredWhenUsed.of(output, parts) if self.gather_when_used else parts.gather(output)
        if self.training:
            enter_cut_region(self.name, self.tp_index)
        return output

    def _copied(self, input: Tensor) -> Tensor:
        if not self.is_tp_parallel or self.__class__.tp_overlap_comm:  # that sums each layer's own, meanwhile
            return input
        return copy_to_ranks(input, self.mp_group, shared=self.share_input_gradients)


class RowParallelLinear(_Linear):
    """A linear layer cut by input features; the bias is whole and added once, after the sum.

    With `split_input` the input is whole on every rank, and this takes its part of it.
    """

    partition_type = "row"

    def __init__(self, module: nn.Module, *, split_input: bool = False, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.split_input = split_input

    def forward(self, input: Tensor) -> Tensor:
        """This rank's `(..., in_features)` to `(..., out_features)`, whole on every rank."""
        if self.split_input and self.is_tp_parallel:
            mine = self.shards.layouts["weight"].intervals[self.tp_index]
            copied = copy_to_ranks(input, self.mp_group, shared=self.share_input_gradients)
            input = take(copied, mine, input.dim() - 1)
        output: Tensor = F.linear(input, self.local_weight)
        if self.is_tp_parallel:
            output = sum_over_ranks(output, self.mp_group)
            if self.training:
                leave_cut_region()
        return output if self.bias is None else output + self.bias


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes `x W^T + b` (or, a Conv1D, `x W + b`) and nothing else.

    A subclass of `nn.Linear` with a forward of its own is tried out on small numbers: Falcon's is a plain product, a
    router's is not.
    """
    if isinstance(module, Conv1D):
        return type(module).forward is Conv1D.forward
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    trial = copy.copy(module)
    trial._parameters = {"weight": nn.Parameter(torch.arange(6.0).view(3, 2)), "bias": None}
    if module.bias is not None:
        trial._parameters["bias"] = nn.Parameter(torch.tensor([0.5, -2.0, 1.0]))
    input = torch.tensor([[[1.0, -3.0], [0.25, 2.0]]])
    try:
        output = trial.forward(input)
    except Exception:  # a forward that wants something else is not a linear layer's
        return False
    return isinstance(output, Tensor) and torch.equal(output, F.linear(input, trial.weight, trial.bias))


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
