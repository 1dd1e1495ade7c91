"""Whether a model is the one that a plan is for, and whether every module can run as the plan says. Changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from autotp_plan.runtime.tensor_parallel.embedding import can_be_cut
from autotp_plan.runtime.tensor_parallel.linear import is_linear
from autotp_plan.runtime.tensor_parallel.module_boundary import averages_by_mean, unknown_inputs
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Parameter, Plan, PlannedModule


def check_model(model: nn.Module, plan: Plan) -> None:
    """Raise MismatchError unless the model's parameters, ties and module types are what the plan says."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
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
        other = first_name.setdefault(id(parameters[name]), name)
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


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def _has_attribute(target: Any, path: str) -> bool:
    for step in path.split("."):
        if not hasattr(target, step):
            return False
        target = getattr(target, step)
    return type(target) is int


def _model_fault(what: str, where: str, got: str, expected: str = "the plan's parameters only") -> Fault:
    return Fault(what=what, where=where, got=got, expected=expected, next="compile a plan for this model")
