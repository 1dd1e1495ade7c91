"""From a plan to a sharded model: replace the planned modules, fill in one rank's weights.

Nothing is decided here, and nothing refused: the model was found to fit the plan before (`fit.check_model`).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.loading.weights import WeightSource, read_weight
from autotp_plan.runtime.tensor_parallel.dropout_rng import has_dropout, use_cut_regions
from autotp_plan.runtime.tensor_parallel.embedding import vocab_parallel
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear, PlannedLayer, RowParallelLinear
from autotp_plan.runtime.tensor_parallel.module_boundary import Border, BorderedModule, plan_module
from autotp_plan.runtime.tensor_parallel.sharded_params import Shards
from autotp_plan.runtime.tensor_parallel.vocab_loss import use_vocab_parallel_loss
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Parameter, Plan, PlannedModule


def shard_model(
    model: nn.Module,
    plan: Plan,
    source: WeightSource,
    ranks: Ranks,
    dtype: torch.dtype | None,
    *,
    share_input_gradients: bool = True,
    vocab_parallel_loss: bool = True,
) -> None:
    """Turn `model` (checked, on meta) into this rank's part of it, in place, with the weights of `source`."""
    holders = _replace_modules(model, plan, ranks)
    holders.update(_plan_modules(model, plan, ranks))
    for module in model.modules():
        if isinstance(module, (PlannedLayer, BorderedModule)):
            module.share_input_gradients = share_input_gradients
    if vocab_parallel_loss:
        use_vocab_parallel_loss(model)
    _set_attributes(model, plan, ranks.tp_rank)
    for weight in source.of_rank(ranks.tp_rank):
        tensor = read_weight(weight, ranks.device, dtype)
        owner, _, leaf = weight.name.rpartition(".")
        if owner in holders and leaf in holders[owner].layouts:
            holders[owner].assign(model.get_submodule(owner), leaf, tensor)
        else:
            _assign(model, weight.name, tensor)
    for tie in plan.tied:
        module, leaf = _owner(model, tie.name)
        module._parameters[leaf] = _parameter(model, tie.to)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(ranks.device)
    for name, shards in holders.items():
        shards.finish(model.get_submodule(name))
    for parameter in plan.expanded():
        if parameter.partial_gradient and ranks.tp_size > 1:
            _parameter(model, parameter.name).register_hook(  # type: ignore[no-untyped-call]
                _sum_gradient(ranks.tp_group)
            )
    if ranks.tp_size > 1 and has_dropout(model):
        use_cut_regions(ranks.tp_group)
    unloaded = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not unloaded, f"still on meta after loading: {unloaded}"
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))
    model.ds_autotp_parsed = True  # type: ignore[assignment]


def local_shard(model: nn.Module, name: str, *, gradient: bool = False) -> Tensor | None:
    """This rank's shard of the plan's parameter `name` in a model from `shard_model`, or the shard's gradient.

    None for a gradient that is not there.
    """
    owner, leaf = _owner(model, name)
    shards = _shards_of(owner)
    if shards is not None and leaf in shards.layouts:
        return shards.gradient(owner, leaf) if gradient else shards.shard(owner, leaf)
    held = _parameter(model, name) if leaf in owner._parameters else owner._buffers[leaf]
    return held.grad if gradient and held is not None else held


def _shards_of(module: nn.Module) -> Shards | None:
    if isinstance(module, PlannedLayer):
        return module.shards
    border = getattr(module, "_border", None)
    return border.shards if isinstance(border, Border) else None


def _plan_modules(model: nn.Module, plan: Plan, ranks: Ranks) -> dict[str, Shards]:
    """Make the modules that keep their forward meet the ranks; what holds the shards of each, by name."""
    inside: dict[str, dict[str, Parameter]] = defaultdict(dict)
    added_once: dict[str, list[str]] = defaultdict(list)
    for parameter in plan.expanded():
        name, _, leaf = parameter.name.rpartition(".")
        if parameter.style == "shard":
            inside[name][leaf] = parameter
        if parameter.add_once:
            added_once[name].append(leaf)
    planned = {name: entry for entry in plan.modules for name in expand(entry.module)}
    holders: dict[str, Shards] = {}
    for name in dict.fromkeys([*inside, *planned, *added_once]):
        module = model.get_submodule(name)
        shards = Shards(
            layouts={leaf: plan.layouts[parameter.layout] for leaf, parameter in inside[name].items()},
            shapes={leaf: plan.shape_of(parameter) for leaf, parameter in inside[name].items()},
            partition_type="column",
            group=ranks.tp_group,
        )
        for leaf in inside[name]:
            whole = module._parameters[leaf]
            assert whole is not None
            shards.replace(module, leaf, whole)
        meets = planned.get(name, PlannedModule(module=name))
        plan_module(module, Border(name=name, planned=meets, shards=shards, added_once=added_once[name]))
        holders[name] = shards
    return holders


def _replace_modules(model: nn.Module, plan: Plan, ranks: Ranks) -> dict[str, Shards]:
    """Put tensor-parallel layers in the place of modules; what holds the shards of each, by name."""
    by_module: dict[str, dict[str, Parameter]] = defaultdict(dict)
    for parameter in plan.expanded():
        module, _, leaf = parameter.name.rpartition(".")
        by_module[module][leaf] = parameter
    replaced: dict[str, Shards] = {}
    for module, parameters in by_module.items():
        weight = parameters.get("weight")
        if weight is not None and weight.style not in ("replicated", "shard"):
            layer = _replace(model, module, parameters, weight.style, weight.gather_output, plan, ranks)
            replaced[module] = layer.shards
    by_name = {parameter.name: parameter for parameter in plan.expanded()}
    for tie in plan.tied:
        if tie.style != "replicated":
            module = tie.name.rpartition(".")[0]
            parameters = {**by_module.get(module, {}), "weight": by_name[tie.to]}
            layer = _replace(model, module, parameters, tie.style, tie.gather_output, plan, ranks)
            replaced[module] = layer.shards
    return replaced


def _replace(
    model: nn.Module,
    name: str,
    parameters: Mapping[str, Parameter],
    style: str,
    gather_output: bool,
    plan: Plan,
    ranks: Ranks,
) -> PlannedLayer:
    module: Any = model.get_submodule(name)
    known: dict[str, Any] = {
        "name": name,
        "layouts": {leaf: plan.layouts[parameter.layout] for leaf, parameter in parameters.items()},
        "shapes": {leaf: plan.shape_of(parameter) for leaf, parameter in parameters.items()},
        "group": ranks.tp_group,
    }
    layer: PlannedLayer
    if style == "column":
        layer = ColumnParallelLinear(module, gather_output=gather_output, **known)
    elif style == "row":
        layer = RowParallelLinear(module, split_input=parameters["weight"].split_input, **known)
    else:
        layer = vocab_parallel(module, **known)
    layer.train(module.training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return layer


def _set_attributes(model: nn.Module, plan: Plan, tp_rank: int) -> None:
    for attribute in plan.module_attributes:
        *path, last = attribute.attribute.split(".")
        for name in expand(attribute.module):
            target: Any = model.get_submodule(name)
            for step in path:
                own = copy.copy(getattr(target, step))
                setattr(target, step, own)
                target = own
            setattr(target, last, attribute.values[tp_rank])


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, leaf = _owner(model, name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    empty = owner._parameters[leaf]
    assert empty is not None and empty.shape == tensor.shape, f"{name}: {tensor.shape} for {empty and empty.shape}"
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=empty.requires_grad and tensor.is_floating_point())


def _sum_gradient(group: Any) -> Any:
    """A hook for a parameter that is whole on every rank but of whose gradient each rank computes only part."""

    def hook(gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    return hook


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, leaf = _owner(model, name)
    parameter = owner._parameters[leaf]
    assert parameter is not None
    return parameter


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf
