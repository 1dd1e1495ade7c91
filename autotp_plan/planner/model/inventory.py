"""What a model is made of: the names, shapes and dtypes of its module parameters, and its config.

Three kinds of model: a checkpoint folder (file headers only), a folder with a bare config.json (the model is built on
the meta device), a live `nn.Module`. How tensors on disk differ from module parameters (other names, tables that are no
parameters, tied heads that are not written) is a fact about the architecture that the caller passes in.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotp_plan.huggingface.meta_model import names_a_dtype, parameters_and_buffers
from autotp_plan.planner.model.fused_tensors import fused_parameters
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.planner.model.tensor_names import DiskNames, DiskTensor, ToDisk, ToMemory
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.names import NameSet, natural_key, starred
from autotp_plan.schemas.plan.entries import NOT_READ, ModelIdentity, Sources
from autotp_plan.schemas.storage.checkpoint import Checkpoint, planned_config
from autotp_plan.schemas.storage.plan_fit import exchanged, is_tied_on_disk
from autotp_plan.schemas.storage.safetensors_header import TensorEntry
from autotp_plan.sources.model_folder import model_folder
from autotp_plan.sources.weight_files import unread_weights

_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.int64": "I64", "torch.int32": "I32",
    "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip

_NO_DTYPE = (
    "config.json names no dtype, and there are no tensors to ask: F32 is assumed, as transformers does. A plan for a "
    "checkpoint of another dtype is compiled from the checkpoint, or with `dtype` in config.json."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterInfo:
    """Shape and dtype (in safetensors' words) of one module parameter, or of a buffer that checkpoints hold.

    `source` is its name on disk if another, `sources` the tensors on disk that it is made of if several. One that is
    `transposed` has its last two dimensions exchanged on disk.
    """

    shape: tuple[int, ...]
    dtype: str
    source: str | None = None
    sources: Sources | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """The module parameters of one model in natural name order, which names are tied to which, and its config."""

    parameters: dict[str, ParameterInfo]
    tied: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def model_type(self) -> str | None:
        value = (self.config or {}).get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architecture(self) -> str | None:
        value = (self.config or {}).get("architectures")
        return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None

    def identity(self) -> ModelIdentity:
        """Names, config and hash of the model, for a plan."""
        return ModelIdentity(
            model_type=self.model_type,
            architecture=self.architecture,
            config=planned_config(self.config),
            inventory=inventory_hash({name: (info.shape, info.dtype) for name, info in self.parameters.items()}),
        )


def inventory_hash(parameters: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """Hash over sorted names with their shapes and dtypes."""
    return documents.fingerprint(sorted([name, list(shape), dtype] for name, (shape, dtype) in parameters.items()))


def take_inventory(model: ModelInput, names: DiskNames) -> Inventory:
    """The inventory of a model.

    Args:
        model: as it was given.
        names: how its tensors on disk differ from its module parameters.

    Raises:
        CheckpointError: a folder that is neither a checkpoint nor has a config.json, weights that are quantised in a
            way that is not understood, or tensors that do not make up the parameters.
        MissingDependencyError: a bare config.json needs transformers, and it is not installed.
    """
    if model.checkpoint is not None:
        return _of_checkpoint(model.checkpoint, model.config, names)
    if not model.is_folder:
        return inventory_of_module(model.module, names)
    quantized = model.dequantize is not None
    notes: tuple[str, ...] = () if quantized or names_a_dtype(model.config or {}) else (_NO_DTYPE,)
    unread = unread_weights(model.folder.folder, model.folder.elsewhere)
    if unread:
        notes += (f"The plan is made from config.json alone.{NOT_READ}{unread}.",)
    return dataclasses.replace(inventory_of_module(model.module, names), config=model.config, notes=notes)


def inventory_of_folder(folder: str | os.PathLike[str], names: DiskNames | None = None) -> Inventory:
    """The inventory of a checkpoint folder, or of a folder with a bare config.json.

    Raises:
        CheckpointError: the folder is neither, or as `take_inventory`.
        MissingDependencyError: a bare config.json needs transformers, and it is not installed.
    """
    return take_inventory(ModelInput(model_folder(folder)), names or DiskNames())


def inventory_of_module(module: Any, names: DiskNames | None = None) -> Inventory:
    """The inventory of a live `torch.nn.Module`, whose parameters may be on the meta device.

    Persistent buffers are listed too: checkpoints hold them.

    Raises:
        CheckpointError: a parameter has a dtype that safetensors files do not have.
    """
    names = names or DiskNames()
    to_disk = ToDisk(names)
    first_name: dict[int, str] = {}
    parameters: dict[str, ParameterInfo] = {}
    tied: dict[str, str] = {}
    ignored = NameSet(names.ignored)
    untied = _untied_in_memory(module, names)
    for name, parameter in parameters_and_buffers(module):
        if name in ignored:
            continue
        if id(parameter) in first_name or (name in names.tied and name not in untied):
            tied[name] = first_name.get(id(parameter)) or names.tied[name]
            continue
        first_name[id(parameter)] = name
        dtype = _DTYPES.get(str(parameter.dtype))
        if dtype is None:
            raise CheckpointError(
                Fault(
                    code="unknown-dtype",
                    what="a parameter has a dtype that cannot be sharded",
                    where=name,
                    got=str(parameter.dtype),
                    expected="one of " + ", ".join(sorted(_DTYPES)),
                    next="convert the model with model.to(torch.bfloat16)",
                )
            )
        shape = tuple(parameter.shape)
        sources = to_disk.sources(name, shape)
        source = to_disk.source(name) if sources is None else None
        transposed = len(shape) > 1 and bool(names.is_transposed(name, exchanged(shape)))  # as it is published
        parameters[name] = ParameterInfo(
            shape=shape, dtype=dtype, source=source, sources=sources, transposed=transposed
        )
    return Inventory(parameters=_sorted(parameters), tied=tied, config=ModelInput(module).config)


def _untied_in_memory(module: Any, names: DiskNames) -> set[str]:
    """The names that the config ties and that have values of their own. Building on meta may have broken a tie."""
    tensors = dict(parameters_and_buffers(module)) if names.tied else {}
    pairs = {name: (tensors[name], tensors[to]) for name, to in names.tied.items() if name in tensors and to in tensors}
    return {
        name
        for name, (one, other) in pairs.items()
        if one is not other and not one.is_meta and not other.is_meta and not bool((one == other).all())
    }


def _of_checkpoint(checkpoint: Checkpoint, config: dict[str, Any] | None, names: DiskNames) -> Inventory:
    to_memory = ToMemory(names, checkpoint.tensors)
    parameters: dict[str, ParameterInfo] = {}
    several: list[tuple[DiskTensor, TensorEntry]] = []
    dropped: dict[str, str] = {}
    untied = _untied_on_disk(checkpoint, to_memory, names)
    faults: list[Fault] = []
    for tensor in checkpoint.tensors.values():
        role = to_memory.role(tensor.name)
        if role is None:
            continue
        name = role.parameter
        if name in names.tied and name not in untied:
            dropped[tensor.name] = names.tied[name]
            continue
        if "{" in tensor.name or "}" in tensor.name:
            faults.append(_brace_fault(tensor.name))
        if role.sources is not None:
            several.append((role, tensor))
            continue
        if name in parameters:
            faults.append(_twice_fault(name, parameters[name].source or name, tensor.name))
        source = tensor.name if name != tensor.name else None
        transposed = names.is_transposed(name, tensor.shape)
        if transposed is None:
            faults.append(_shape_fault(tensor.name, tensor.shape, names.transposed[starred(name)]))
            continue
        shape = exchanged(tensor.shape) if transposed else tensor.shape
        parameters[name] = ParameterInfo(shape=shape, dtype=tensor.dtype, source=source, transposed=transposed)
    book = FaultBook()
    for name, made in fused_parameters(several, book).items():
        if name in parameters:
            faults.append(_twice_fault(name, parameters[name].source or name, ", ".join(made.sources.names)))
        parameters[name] = ParameterInfo(shape=made.shape, dtype=made.dtype, sources=made.sources)
    faults += book.faults()
    faults += [_lost_fault(disk, to) for disk, to in dropped.items() if to not in parameters]
    if faults:
        raise CheckpointError(faults)
    notes = checkpoint.notes + tuple(
        f"{name} is on disk but tied to {to}: only the latter is used." for name, to in sorted(dropped.items())
    )
    notes += tuple(
        f"{name} has other values on disk than {to}: it is not tied, whatever the config says."
        for name, to in untied.items()
    )
    tied = {name: to for name, to in names.tied.items() if to in parameters and name not in untied}
    return Inventory(parameters=_sorted(parameters), tied=tied, config=config, notes=notes)


def _untied_on_disk(checkpoint: Checkpoint, to_memory: ToMemory, names: DiskNames) -> dict[str, str]:
    """The names that the config ties and that have values of their own, with what they would be tied to."""
    wanted = names.tied.keys() | set(names.tied.values())
    found: dict[str, TensorEntry] = {}
    for tensor in checkpoint.tensors.values() if names.tied else ():
        role = to_memory.role(tensor.name)
        if role is not None and role.sources is None and role.parameter in wanted:
            found[role.parameter] = tensor
    try:
        return {
            name: to
            for name, to in names.tied.items()
            if name in found and to in found and to not in names.tied and not is_tied_on_disk(found[name], found[to])
        }
    except (OSError, EOFError) as error:
        raise CheckpointError(
            Fault(
                code="unreadable-tensor",
                what="a tensor cannot be read",
                where=str(checkpoint.folder),
                got=str(error),
                expected="a complete checkpoint",
                next="fetch the checkpoint again",
            )
        ) from None


def _sorted(parameters: dict[str, ParameterInfo]) -> dict[str, ParameterInfo]:
    return dict(sorted(parameters.items(), key=lambda item: natural_key(item[0])))


def _lost_fault(name: str, to: str) -> Fault:
    return Fault(
        code="tied-to-missing-tensor",
        what="a tensor is tied to a parameter that the checkpoint lacks",
        where=name,
        got=f"tied to {to}",
        expected=f"{to} in the checkpoint, and not tied itself",
        next="correct config.json or the spec's `tied`, or save the checkpoint again",
    )


def _twice_fault(name: str, first: str, second: str) -> Fault:
    return Fault(
        code="two-tensors-one-parameter",
        what="two tensors of the checkpoint are one parameter",
        where=name,
        got=f"{first} and {second}",
        expected="one tensor for each parameter",
        next="remove one of them from the checkpoint",
    )


def _shape_fault(name: str, shape: Sequence[int], wanted: Sequence[int]) -> Fault:
    return Fault(
        code="neither-shape",
        what="a tensor that may be transposed on disk has another shape",
        where=name,
        got=str(list(shape)),
        expected=f"{list(wanted)} (-1 is any size), or that with the last two exchanged",
        next="config.json is another model's, or the checkpoint is broken",
    )


def _brace_fault(name: str) -> Fault:
    return Fault(
        code="brace-in-name",
        what="a tensor's name has a brace",
        where=name,
        got=name,
        expected="names without { and }, which stand for several names in a plan",
        next="rename the tensor",
    )
