"""From a plan to a sharded model: build it on meta, replace the planned modules, fill in one rank's weights.

Nothing is decided here. A module that the plan wants cut and that no layer of ours can stand for is refused, and so is
a model whose parameters are not exactly the plan's.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autotp_plan.runtime.embedding import can_be_cut, vocab_parallel
from autotp_plan.runtime.layers import ColumnParallelLinear, PlannedLayer, RowParallelLinear, is_linear
from autotp_plan.runtime.modules import Border, averages_by_mean, plan_module, unknown_inputs
from autotp_plan.runtime.randomness import has_dropout, use_cut_regions
from autotp_plan.runtime.ranks import Ranks
from autotp_plan.runtime.shards import Shards
from autotp_plan.runtime.weights import WeightSource, read_weight
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan import Parameter, Plan, PlannedModule


def build_model(folder: Path, plan: Plan, *, on_meta: bool = True, **options: Any) -> nn.Module:
    """The transformers model of `folder`'s config with parameters on meta and real buffers.

    With `on_meta=False` the parameters are real too. `options` go to transformers, such as
    `attn_implementation="sdpa"`. Raises MismatchError when the config does not name a model class that transformers
    has.
    """
    import transformers

    model: Any
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        architecture = getattr(transformers, plan.model.architecture or "", None)
        with _parameters_on_meta() if on_meta else contextlib.nullcontext():
            if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                model = architecture._from_config(config, **options)  # type: ignore[attr-defined]
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, KeyError, OSError) as error:
        raise MismatchError(
            Fault(
                what="transformers cannot build the plan's model",
                where=str(folder),
                got=f"{type(error).__name__}: {error}",
                expected=f"a config.json of {plan.model.architecture or 'a transformers model'}",
                next="give the model yourself: plan.load_model(path, model=module_on_meta)",
            )
        ) from None
    model.tie_weights()
    built: nn.Module = model
    return built


_LARGE = 2**27
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class _LargeOnMeta(TorchFunctionMode):
    """While active, new tensors of many elements are on meta: no buffer is that large, and a parameter is moved there
    only once it is made. Fused experts of one layer can be 30 GB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            empty = func(*args, **{**kwargs, "device": "meta"})
            if empty.numel() >= _LARGE:
                return empty
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


def check_model(model: nn.Module, plan: Plan) -> None:
    """Raise MismatchError unless the model's parameters, ties and module types are what the plan says."""
    shapes = _parameter_shapes(model)
    planned = {parameter.name: plan.shape_of(parameter) for parameter in plan.expanded()}
    ties = {tie.name: tie.to for tie in plan.tied}
    modules = dict(model.named_modules())
    faults: list[Fault] = []
    for name in shapes.keys() - planned.keys() - ties.keys():
        faults.append(
            _model_fault("the model has a parameter that the plan does not know", name, str(list(shapes[name])))
        )
    for name in planned.keys() - shapes.keys():
        if name not in _buffers(model):
            faults.append(_model_fault("the model lacks a parameter of the plan", name, "", str(list(planned[name]))))
    for name in planned.keys() & shapes.keys():
        if shapes[name] != planned[name]:
            faults.append(
                _model_fault(
                    "a parameter's shape is not the plan's", name, str(list(shapes[name])), str(list(planned[name]))
                )
            )
    first_name: dict[int, str] = {}
    for name in planned.keys() & shapes.keys():
        other = first_name.setdefault(id(_parameter(model, name)), name)
        if other != name:
            faults.append(
                _model_fault("two parameters of the plan are tied in the model", max(name, other), min(name, other))
            )
    for name, to in ties.items():  # building on meta may have broken a tie; loading restores it
        if name in shapes and to in planned and shapes[name] != planned[to]:
            got, expected = str(list(shapes[name])), str(list(planned[to]))
            faults.append(_model_fault(f"a parameter cannot be tied to {to}", name, got, expected))
    for parameter in plan.expanded():
        if parameter.style != "replicated":
            faults.extend(_module_faults(parameter, modules, plan))
    for entry in plan.modules:
        for name in expand(entry.module):
            faults.extend(_border_faults(name, modules.get(name), entry))
    for attribute in plan.module_attributes:
        for module in expand(attribute.module):
            if not _has_attribute(modules.get(module), attribute.attribute):
                where = f"{module}.{attribute.attribute}"
                faults.append(_model_fault("the model lacks an attribute that the plan sets", where, "", "an integer"))
    if faults:
        raise MismatchError(faults)


def shard_model(model: nn.Module, plan: Plan, source: WeightSource, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Turn `model` (checked, on meta) into this rank's part of it, in place, with the weights of `source`."""
    holders = _replace_modules(model, plan, ranks)
    holders.update(_plan_modules(model, plan, ranks))
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


def _module_faults(parameter: Parameter, modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[Fault]:
    name, _, leaf = parameter.name.rpartition(".")
    module = modules.get(name)
    if module is None:
        return  # the missing parameter is a fault already
    if parameter.style == "shard":
        if is_linear(module) or isinstance(module, nn.Embedding):
            yield _model_fault(
                "a linear layer or embedding cannot compute with its part in its own way",
                parameter.name,
                f"shard, for {type(module).__name__}",
                "column, row or vocab",
            )
    elif leaf == "weight":
        vocab = parameter.style == "vocab"
        runs = can_be_cut(module) if vocab else is_linear(module)
        if not runs:
            yield _model_fault(
                f"no tensor-parallel layer runs {parameter.style} for this module",
                parameter.name,
                f"{type(module).__module__}.{type(module).__name__}",
                "torch.nn.Embedding, or a subclass that looks up through super().forward"
                if vocab
                else "torch.nn.Linear or transformers' Conv1D, or one that computes the same; shard for other modules",
            )
        elif parameter.gather_output and plan.shape_of(parameter) != plan.layouts[parameter.layout].shape:
            yield _model_fault(
                "the output of a weight that is cut in a view cannot be gathered",
                parameter.name,
                f"cut in {list(plan.layouts[parameter.layout].shape)}",
                f"cut in {list(plan.shape_of(parameter))}",
            )
        elif isinstance(module, nn.Embedding) and (
            module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        ):
            yield _model_fault(
                "an embedding option cannot be kept when the table is cut",
                parameter.name,
                f"max_norm={module.max_norm}, scale_grad_by_freq={module.scale_grad_by_freq}, sparse={module.sparse}",
                "none of them set",
            )
    elif leaf != "bias" or parameter.style != "column":
        yield _model_fault(
            "no tensor-parallel layer cuts this parameter", parameter.name, parameter.style, "replicated"
        )
    layout = plan.layouts[parameter.layout]
    replicas = iv.replica_groups(layout.intervals)
    whole_only = parameter.style != "column" or parameter.gather_output
    if (replicas is None and whole_only) or (
        parameter.style in ("row", "vocab") and replicas is not None and len(replicas) < plan.tp_size
    ):
        yield _model_fault(
            "the ranks share parts of this parameter in a way that no tensor-parallel layer runs",
            parameter.name,
            f"{parameter.style}, {layout.name}",
            "shares of KV heads in column-parallel weights; use a smaller tp_size",
        )


def _border_faults(name: str, module: nn.Module | None, planned: PlannedModule) -> Iterator[Fault]:
    if module is None:
        yield _model_fault("the model lacks a module that the plan names", name, "", "the plan's modules")
        return
    for unknown in unknown_inputs(module, planned):
        known = ", ".join(list(inspect.signature(type(module).forward).parameters)[1:])
        yield _model_fault("a module takes no such input", f"{name}: {unknown}", known, "an argument of its forward")
    if planned.mean_over_ranks and not averages_by_mean(module):
        yield _model_fault(
            "a norm over a cut width does not take its averages with `mean`",
            name,
            f"{type(module).__module__}.{type(module).__name__}",
            "an RMS or layer norm written out, with a weight of its width",
        )


def _parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, leaf = _owner(model, name)
    parameter = owner._parameters[leaf]
    assert parameter is not None
    return parameter


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _has_attribute(target: Any, path: str) -> bool:
    for step in path.split("."):
        if not hasattr(target, step):
            return False
        target = getattr(target, step)
    return type(target) is int


def _model_fault(what: str, where: str, got: str, expected: str = "the plan's parameters only") -> Fault:
    return Fault(what=what, where=where, got=got, expected=expected, next="compile a plan for this model")
