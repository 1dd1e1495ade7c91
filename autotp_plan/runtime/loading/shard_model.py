"""From a plan to a sharded model: replace the planned modules, fill in one rank's weights.

Nothing is decided here, and little refused: `check_model` found before that the model fits the plan.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.internals import mark_as_sharded
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.loading.check_model import layers_with_collectives
from autotp_plan.runtime.loading.replace_modules import add_boundaries, replace_layers, skip_fused_kernels
from autotp_plan.runtime.losses.chunked_loss import use_chunked_loss
from autotp_plan.runtime.losses.vocab_loss import use_vocab_parallel_loss
from autotp_plan.runtime.sequence_parallel.apply import shard_sequence
from autotp_plan.runtime.tensor_parallel.collectives import take
from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer
from autotp_plan.runtime.tensor_parallel.module_boundary import WithCollectives
from autotp_plan.runtime.tensor_parallel.sharded_params import ShardedParams, takes_hooks
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan


def shard_model(
    model: nn.Module,
    plan: Plan,
    weights: Iterable[tuple[str, Tensor]],
    ranks: Ranks,
    *,
    share_input_gradients: bool = True,
    vocab_parallel_loss: bool = True,
    loss_chunks: int | None = None,
) -> None:
    """Turn `model` into this rank's part of it, in place. No communication.

    Args:
        model: a model on meta that `check_model` found to fit the plan.
        plan: the plan.
        weights: this rank's shard of every parameter, by name.
        ranks: this process's place in the mesh.
        share_input_gradients: all-reduce the gradient of a tensor once for all layers that take it.
        vocab_parallel_loss: let a causal LM compute its loss from each rank's logits, where it can.
        loss_chunks: compute these in as many chunks; None computes them at once.

    Raises:
        MismatchError: the model's loss cannot be computed in chunks.
    """
    sharded = {**replace_layers(model, plan, ranks), **add_boundaries(model, plan, ranks)}
    shard_sequence(model, plan, ranks)
    if ranks.tp_size > 1:
        skip_fused_kernels(model, layers_with_collectives(plan))
    for module in model.modules():
        if isinstance(module, (PlannedLayer, WithCollectives)):
            module.share_input_gradients = share_input_gradients
    if loss_chunks is not None:
        use_chunked_loss(model, loss_chunks)
    elif vocab_parallel_loss:
        use_vocab_parallel_loss(model)
    _set_attributes(model, plan, ranks.tp_rank)
    _load_weights(model, sharded, weights)
    restore_ties(model, plan)
    _shard_buffers(model, plan, ranks.tp_rank)
    _move_buffers(model, ranks.device)
    for name, shards in sharded.items():
        shards.finish(model.get_submodule(name))
    if ranks.tp_size > 1:
        sum_partial_gradients(model, plan, ranks.tp_group)
    unloaded = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not unloaded, f"still on meta after loading: {unloaded}"
    mark_as_sharded(model)


def _set_attributes(model: nn.Module, plan: Plan, tp_rank: int) -> None:
    """Set what modules read in their forward, such as numbers of heads, to this rank's values."""
    for attribute in plan.module_attributes:
        *path, last = attribute.attribute.split(".")
        for name in expand(attribute.module):
            target: Any = model.get_submodule(name)
            for step in path:
                of_this_module = copy.copy(getattr(target, step))
                setattr(target, step, of_this_module)
                target = of_this_module
            setattr(target, last, attribute.values[tp_rank])


def _load_weights(
    model: nn.Module, sharded: Mapping[str, ShardedParams], weights: Iterable[tuple[str, Tensor]]
) -> None:
    for parameter, tensor in weights:
        name, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(name)
        if name in sharded and leaf in sharded[name].layouts:
            sharded[name].assign(owner, leaf, tensor)
        else:
            _assign(owner, leaf, tensor)


def _assign(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Replace a replicated parameter or buffer on meta by its weights."""
    if leaf in dict(owner.named_buffers(recurse=False, remove_duplicate=False)):
        setattr(owner, leaf, tensor)
        return
    empty = owner.get_parameter(leaf)
    assert empty.shape == tensor.shape, f"{leaf}: {tensor.shape} for {empty.shape}"
    trains = empty.requires_grad and tensor.is_floating_point()
    owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=trains))


def restore_ties(model: nn.Module, plan: Plan) -> None:
    """Make each parameter that the plan ties to another that other one.

    Args:
        model: a model whose weights are loaded.
        plan: its plan.
    """
    for tie in plan.tied:
        name, _, leaf = tie.name.rpartition(".")
        source, _, of_source = tie.to.rpartition(".")
        tied = tensor_of(model.get_submodule(source), of_source)
        model.get_submodule(name).register_parameter(leaf, tied)


def _shard_buffers(model: nn.Module, plan: Plan, tp_rank: int) -> None:
    """Give buffers that are sharded as a parameter is this rank's values."""
    layouts = {parameter.name: plan.layouts[parameter.layout] for parameter in plan.expanded()}
    for entry in plan.modules:
        for module, (buffer, leaf) in itertools.product(expand(entry.module), entry.buffers.items()):
            owner, held = model.get_submodule(module), layouts[f"{module}.{leaf}"].intervals[tp_rank]
            full = owner.get_buffer(buffer)
            setattr(owner, buffer, take(full, held, full.dim() - 1).clone())


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, buffer.to(device))


def sum_partial_gradients(model: nn.Module, plan: Plan, group: Any) -> None:
    """All-reduce the gradients of replicated parameters of which each rank computes only part."""
    inside_adapters = model.named_parameters(remove_duplicate=False)
    named = {name.replace(".base_layer.", "."): parameter for name, parameter in inside_adapters}
    for parameter in plan.expanded():
        if parameter.partial_gradient and parameter.name in named:  # else it is a buffer
            _sum_gradient(named[parameter.name], group)
    for module in model.modules():
        if getattr(module, _SUMMED, False):
            sum_gradients(module, group)


def sum_gradients(module: nn.Module, group: Any) -> None:
    """All-reduce the gradients of a module that no plan knows, an adapter's, and of copies of it."""
    setattr(module, _SUMMED, True)
    for parameter in module.parameters():
        _sum_gradient(parameter, group)


_SUMMED = "tp_sums_gradients"


def _sum_gradient(parameter: nn.Parameter, group: Any) -> None:
    def all_reduced(gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    with takes_hooks(parameter):
        parameter.register_hook(all_reduced)  # type: ignore[no-untyped-call]
