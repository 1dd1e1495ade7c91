"""Replacing the modules of a model on meta by tensor-parallel ones, as a plan says. Decides nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.tensor_parallel.embedding import vocab_parallel
from autotp_plan.runtime.tensor_parallel.linear import ColumnParallelLinear, PlannedLayer, RowParallelLinear
from autotp_plan.runtime.tensor_parallel.module_boundary import Boundary, add_collectives
from autotp_plan.runtime.tensor_parallel.sharded_params import ShardedParams
from autotp_plan.runtime.tensor_parallel.weight_reads import (
    WithoutFusedKernels,
    keep_from_fused_kernels,
    layers_fused,
)
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Crossing, Parameter, Plan, PlannedModule

COPY = Crossing(operation="copy")
"""An output whose gradient is all-reduced: the one collective that a row-parallel layer can be given."""


def replace_layers(model: nn.Module, plan: Plan, ranks: Ranks) -> dict[str, ShardedParams]:
    """Replace linear layers and embeddings by tensor-parallel layers.

    Args:
        model: the model, on meta.
        plan: its plan.
        ranks: this process's place in the mesh.

    Returns:
        The sharded parameters of each module that was replaced, by its name.
    """
    by_module: dict[str, dict[str, Parameter]] = defaultdict(dict)
    for parameter in plan.expanded():
        module, _, leaf = parameter.name.rpartition(".")
        by_module[module][leaf] = parameter
    by_name = {parameter.name: parameter for parameter in plan.expanded()}
    tied: dict[str, dict[str, Parameter]] = defaultdict(dict)
    for tie in plan.tied:
        module, _, leaf = tie.name.rpartition(".")
        tied[module][leaf] = by_name[tie.to]
    copied = {name for entry in plan.modules if entry.output == COPY for name in expand(entry.module)}
    replaced: dict[str, ShardedParams] = {}
    for module, parameters in by_module.items():
        weight = parameters.get("weight")
        if weight is not None and weight.style not in ("replicated", "shard"):
            every = {**parameters, **tied[module]}
            layer = _replace(model, module, every, weight.style, weight.gather_output, plan, ranks)
            if isinstance(layer, RowParallelLinear):
                layer.copy_output = module in copied
            replaced[module] = layer.shards
    for tie in plan.tied:
        module, _, leaf = tie.name.rpartition(".")
        if tie.style != "replicated" and leaf == "weight":
            every = {**by_module.get(module, {}), **tied[module]}
            layer = _replace(model, module, every, tie.style, tie.gather_output, plan, ranks)
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
    options: dict[str, Any] = {
        "name": name,
        "layouts": {leaf: plan.layouts[parameter.layout] for leaf, parameter in parameters.items()},
        "shapes": {leaf: plan.shape_of(parameter) for leaf, parameter in parameters.items()},
        "group": ranks.tp_group,
    }
    layer: PlannedLayer
    if style == "column":
        layer = ColumnParallelLinear(module, gather_output=gather_output, **options)
    elif style == "row":
        layer = RowParallelLinear(module, split_input=parameters["weight"].split_input, **options)
    else:
        layer = vocab_parallel(module, **options)
    layer.train(module.training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return layer


def add_boundaries(model: nn.Module, plan: Plan, ranks: Ranks) -> dict[str, ShardedParams]:
    """Add collectives at the inputs and outputs of modules that keep their forward, and shard their parameters.

    Parallel layers do not: what a plan says of their outputs is theirs from `replace_layers`.

    Args:
        model: the model, on meta.
        plan: its plan.
        ranks: this process's place in the mesh.

    Returns:
        The sharded parameters of each such module, by its name.
    """
    inside: dict[str, dict[str, Parameter]] = defaultdict(dict)
    added_once: dict[str, list[str]] = defaultdict(list)
    for parameter in plan.expanded():
        name, _, leaf = parameter.name.rpartition(".")
        if parameter.style == "shard":
            inside[name][leaf] = parameter
        if parameter.add_once:
            added_once[name].append(leaf)
    planned = {name: entry for entry in plan.modules for name in expand(entry.module)}
    sharded: dict[str, ShardedParams] = {}
    for name in dict.fromkeys([*inside, *planned, *added_once]):
        module = model.get_submodule(name)
        if isinstance(module, PlannedLayer):
            continue
        shards = ShardedParams(
            layouts={leaf: plan.layouts[parameter.layout] for leaf, parameter in inside[name].items()},
            shapes={leaf: plan.shape_of(parameter) for leaf, parameter in inside[name].items()},
            partition_type="column",
            group=ranks.tp_group,
        )
        for leaf in inside[name]:
            shards.replace(module, leaf, module.get_parameter(leaf))
        entry = planned.get(name, PlannedModule(module=name))
        add_collectives(module, Boundary(name=name, planned=entry, shards=shards, added_once=added_once[name]))
        sharded[name] = shards
    return sharded


def skip_fused_kernels(model: nn.Module, layers: Iterable[str]) -> None:
    """Let mixers whose fused kernels would take the weights of `layers` call these layers instead.

    Args:
        model: the model, its layers replaced.
        layers: names of layers that communicate.
    """
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in layers_fused(module) and not isinstance(module, WithoutFusedKernels):
            keep_from_fused_kernels(module)
