"""Whether a model is the one that a plan is for, and whether every module can run as the plan says. Changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from autotp_plan.probes.linear import is_linear, orientation
from autotp_plan.probes.norms import averages_by_mean
from autotp_plan.runtime.loading.replace_modules import COPY
from autotp_plan.runtime.tensor_parallel.embedding import can_be_vocab_parallel
from autotp_plan.runtime.tensor_parallel.module_boundary import unknown_inputs
from autotp_plan.runtime.tensor_parallel.weight_reads import layers_read
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.layout import Layout, group_view
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Parameter, Plan, PlannedModule


def check_model(model: nn.Module, plan: Plan) -> None:
    """Check that a model is the plan's, and that each of its modules can run as the plan says.

    Args:
        model: a model whose parameters may be on meta.
        plan: the plan.

    Raises:
        MismatchError: with everything that does not fit: parameters, ties, types of modules, attributes.
    """
    modules = dict(model.named_modules())
    faults = [*_parameter_faults(model, plan), *_tie_faults(model, plan)]
    for parameter in plan.expanded():
        if parameter.style != "replicated":
            faults.extend(_module_faults(parameter, modules, plan))
    faults.extend(_read_faults(modules, plan))
    styles = {parameter.name: parameter.style for parameter in plan.expanded()}
    for entry in plan.modules:
        for name in expand(entry.module):
            faults.extend(_boundary_faults(name, modules.get(name), entry))
            faults.extend(_parallel_layer_faults(name, styles.get(f"{name}.weight", ""), entry))
            faults.extend(_buffer_faults(name, modules.get(name), entry, plan))
    for attribute in plan.module_attributes:
        for name in expand(attribute.module):
            if not _has_attribute(modules.get(name), attribute.attribute):
                where = f"{name}.{attribute.attribute}"
                faults.append(_fault("the model lacks an attribute that the plan sets", where, "", "an integer"))
    if faults:
        raise MismatchError(faults)


def _parameter_faults(model: nn.Module, plan: Plan) -> Iterator[Fault]:
    """Parameters that the model or the plan lacks, and other shapes."""
    shapes = _shapes(model)
    planned = {parameter.name: plan.shape_of(parameter) for parameter in plan.expanded()}
    buffers = dict(model.named_buffers())
    for name in shapes.keys() - planned.keys() - {tie.name for tie in plan.tied}:
        yield _fault("the model has a parameter that the plan does not know", name, str(list(shapes[name])))
    for name in planned.keys() - shapes.keys() - buffers.keys():
        yield _fault("the model lacks a parameter of the plan", name, "", str(list(planned[name])))
    for name in planned.keys() & shapes.keys():
        if shapes[name] != planned[name]:
            got, expected = str(list(shapes[name])), str(list(planned[name]))
            yield _fault("a parameter's shape is not the plan's", name, got, expected)


def _tie_faults(model: nn.Module, plan: Plan) -> Iterator[Fault]:
    """Parameters that are tied in the model and not in the plan, or cannot be tied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = _shapes(model)
    planned = {parameter.name: plan.shape_of(parameter) for parameter in plan.expanded()}
    first_name: dict[int, str] = {}
    for name in planned.keys() & shapes.keys():
        other = first_name.setdefault(id(parameters[name]), name)
        if other != name:
            yield _fault("two parameters of the plan are tied in the model", max(name, other), min(name, other))
    for tie in plan.tied:  # building on meta may have broken a tie; loading restores it
        if tie.name in shapes and tie.to in planned and shapes[tie.name] != planned[tie.to]:
            got, expected = str(list(shapes[tie.name])), str(list(planned[tie.to]))
            yield _fault(f"a parameter cannot be tied to {tie.to}", tie.name, got, expected)


def _module_faults(parameter: Parameter, modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[Fault]:
    """Why the module of a sharded parameter cannot run with shards."""
    name, _, leaf = parameter.name.rpartition(".")
    module = modules.get(name)
    if module is None:
        return  # the missing parameter is a fault already
    if parameter.style == "shard":
        yield from _own_forward_faults(parameter, module, modules.get(name.rpartition(".")[0]))
    elif leaf == "weight":
        yield from _weight_faults(parameter, module, plan)
    elif leaf != "bias" or parameter.style != "column":
        yield _fault("no tensor-parallel layer shards this parameter", parameter.name, parameter.style, "replicated")
    yield from _replica_faults(parameter, plan)


def _own_forward_faults(parameter: Parameter, module: nn.Module, parent: nn.Module | None) -> Iterator[Fault]:
    """A linear layer that is not called keeps what it holds: Mamba's mixers multiply by `dt_proj.weight` themselves."""
    linear = isinstance(module, (nn.Linear, Conv1D)) and is_linear(module)
    leaf = parameter.name.split(".")[-2]
    if isinstance(module, nn.Embedding) or (linear and (parent is None or leaf not in layers_read(parent))):
        yield _fault(
            "a linear layer or embedding cannot keep its forward when its weight is sharded",
            parameter.name,
            f"shard, for {type(module).__name__}",
            "column, row or vocab",
        )


def _weight_faults(parameter: Parameter, module: nn.Module, plan: Plan) -> Iterator[Fault]:
    vocab = parameter.style == "vocab"
    shape, layout = plan.shape_of(parameter), plan.layouts[parameter.layout]
    if not (can_be_vocab_parallel(module) if vocab else is_linear(module)):
        yield _fault(
            f"no tensor-parallel layer runs {parameter.style} for this module",
            parameter.name,
            _class_name(module),
            "torch.nn.Embedding, or a subclass that looks up through super().forward"
            if vocab
            else "torch.nn.Linear or transformers' Conv1D, or one that computes the same; shard for other modules",
        )
    elif not vocab and (held := _sharded_dim(shape, layout)) != (expected := _dim_of(parameter.style, module)):
        yield _fault(
            f"the weight is sharded along its {'input' if parameter.style == 'column' else 'output'} features",
            parameter.name,
            f"{parameter.style}, along dim {held} of {list(shape)}",
            f'dim {expected}, as {_class_name(module)} lies: in the spec file "partition_dim": {expected}',
        )
    elif parameter.gather_output and shape != layout.shape:
        yield _fault(
            "the output of a weight that is sharded in another shape cannot be gathered",
            parameter.name,
            f"sharded in {list(layout.shape)}",
            f"sharded in {list(shape)}",
        )
    elif isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        yield _fault(
            "an embedding option cannot be kept when the table is sharded",
            parameter.name,
            f"max_norm={module.max_norm}, scale_grad_by_freq={module.scale_grad_by_freq}, sparse={module.sparse}",
            "none of them set",
        )


def _read_faults(modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[Fault]:
    """Layers with collectives whose weight another module's code uses: the collectives would be skipped."""
    for name in layers_with_collectives(plan):
        parent, _, leaf = name.rpartition(".")
        if plan.tp_size > 1 and parent in modules and leaf in layers_read(modules[parent]):
            yield Fault(
                what="code computes with the weight of a sharded layer and does not call the layer",
                where=f"{name}.weight",
                got=f"self.{leaf}.weight in {_class_name(modules[parent])}",
                expected="a call of the layer, which also does what the ranks have to do together",
                next='replicate the weight ("partition_type": "skip"), or call the layer',
            )


def layers_with_collectives(plan: Plan) -> list[str]:
    """The modules of a plan that must be called, because they communicate: parallel layers, norms over all ranks."""
    layers = {
        parameter.name.rpartition(".")[0]
        for parameter in plan.expanded()
        if parameter.style in ("column", "row") and not parameter.gather_output
    }
    norms = {name for entry in plan.modules if entry.mean_over_ranks for name in expand(entry.module)}
    return sorted(layers | norms)


def _sharded_dim(shape: Sequence[int], layout: Layout) -> int | None:
    """The dimension of a weight of `shape` that a layout, perhaps of a view of it, shards."""
    groups = group_view(shape, layout.shape) or ()
    return next((dim for dim, group in enumerate(groups) if layout.dim in group), None)


def _dim_of(style: str, module: nn.Module) -> int:
    """The dimension of a linear layer's weight that is sharded in `style`."""
    return int((style == "row") != (orientation(module) == "transposed"))


def _replica_faults(parameter: Parameter, plan: Plan) -> Iterator[Fault]:
    """Shards that several ranks hold, in whole or in part, where no layer sums their gradients."""
    layout = plan.layouts[parameter.layout]
    replicas = iv.replica_groups(layout.intervals)
    partly = replicas is None and (parameter.style not in ("column", "shard") or parameter.gather_output)
    equal = parameter.style in ("row", "vocab") and replicas is not None and len(replicas) < plan.tp_size
    if partly or equal:
        yield _fault(
            "the ranks share parts of this parameter in a way that no tensor-parallel layer runs",
            parameter.name,
            f"{parameter.style}, {layout.name}",
            "replicated heads or groups in column-parallel weights and in modules with a forward of their own alone; "
            "use a smaller tp_size",
        )


def _boundary_faults(name: str, module: nn.Module | None, planned: PlannedModule) -> Iterator[Fault]:
    if module is None:
        yield _fault("the model lacks a module that the plan names", name, "", "the plan's modules")
        return
    for unknown in unknown_inputs(module, planned):
        known = ", ".join(list(inspect.signature(type(module).forward).parameters)[1:])
        yield _fault("a module takes no such input", f"{name}: {unknown}", known, "an argument of its forward")
    if planned.mean_over_ranks and not averages_by_mean(module):
        yield _fault(
            "a norm over a sharded width does not take its averages with `mean`",
            name,
            _class_name(module),
            "an RMS or layer norm written out, with a weight of its width",
        )


def _parallel_layer_faults(name: str, style: str, planned: PlannedModule) -> Iterator[Fault]:
    """Collectives that a parallel layer, which has collectives of its kind, cannot be given."""
    copied_row = style == "row" and planned == PlannedModule(module=planned.module, output=COPY)
    if style in ("column", "row", "vocab") and not copied_row:
        yield _fault(
            "a parallel layer cannot be given collectives of its own",
            name,
            f"a {style}-parallel layer among the modules of the plan",
            "at most a row-parallel layer whose whole output is copied",
        )


def _buffer_faults(name: str, module: nn.Module | None, planned: PlannedModule, plan: Plan) -> Iterator[Fault]:
    """Buffers that cannot be sharded as the plan says."""
    layouts = {parameter.name: plan.layouts[parameter.layout] for parameter in plan.expanded()}
    buffers = {} if module is None else dict(module.named_buffers())
    for buffer, leaf in planned.buffers.items():
        layout = layouts[f"{name}.{leaf}"]
        size = layout.shape[layout.dim or 0]
        shape = tuple(buffers[buffer].shape) if buffer in buffers else ()
        if not shape or shape[-1] != size:
            yield _fault(
                "a buffer is not as long as the parameter by which the plan shards it",
                f"{name}.{buffer}",
                str(list(shape)),
                f"[..., {size}]",
            )


def _has_attribute(target: Any, path: str) -> bool:
    for step in path.split("."):
        if not hasattr(target, step):
            return False
        target = getattr(target, step)
    return type(target) is int


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _fault(what: str, where: str, got: str, expected: str = "the plan's parameters only") -> Fault:
    return Fault(what=what, where=where, got=got, expected=expected, next="compile a plan for this model")
