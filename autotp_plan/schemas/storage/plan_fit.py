"""Whether tensors on disk are what a plan says: the one check of `check`, presplit, merge, and loading.

Checkpoints and shards are checked alike: by names, shapes and dtypes, before a tensor is read. Whether a plan is sound
by itself is not asked here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import Fault
from autotp_plan.schemas.names import NameSet, fold
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.storage.byte_ranges import ByteRanges, same_bytes
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, Checkpoint, config_hash
from autotp_plan.schemas.storage.safetensors_header import TensorEntry

COMPILE_AGAIN = "give the checkpoint that the plan was compiled for, or compile a plan for this one"


def checkpoint_faults(plan: Plan, checkpoint: Checkpoint) -> list[Fault]:
    """What of a checkpoint is not what a plan was compiled for.

    Returns:
        Tensors missing, of another shape or dtype, or too many; config.json. Empty when the plan fits.
    """
    return [
        *tensor_faults(plan, checkpoint.tensors),
        *_unplanned_faults(plan, checkpoint),
        *config_faults(plan, checkpoint.config, checkpoint.folder),
    ]


def tensor_faults(plan: Plan, tensors: Mapping[str, TensorEntry]) -> list[Fault]:
    """What is missing among the tensors of a checkpoint, of another shape or dtype than the plan says, or not tied."""
    faults = _folded(
        fault
        for parameter in plan.expanded()
        for fault in parameter_faults(parameter, plan.shape_of(parameter), tensors)
    )
    return faults or list(_tie_faults(plan, tensors))


def is_tied_on_disk(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two tensors are one by their values, as `from_pretrained` ties them.

    Args:
        first: a tensor that a config ties to `second`.
        second: a tensor of the same checkpoint.

    Raises:
        OSError: a file cannot be read.
        EOFError: a file ends before its header says.
    """
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return same_bytes(ByteRanges.of([first]), ByteRanges.of([second]))


def _tie_faults(plan: Plan, tensors: Mapping[str, TensorEntry]) -> Iterator[Fault]:
    """Tensors that the plan ties to another, and that have values of their own."""
    on_disk = {entry.name: entry.names_on_disk()[0] for entry in plan.expanded() if entry.sources is None}
    for tie in plan.tied:
        to = on_disk.get(tie.to)
        if to is not None and tie.name in tensors and not is_tied_on_disk(tensors[tie.name], tensors[to]):
            yield Fault(
                code="tied-values-differ",
                what="the plan ties a tensor that has values of its own",
                where=tie.name,
                got=f"other values than {to}",
                expected=f"the values of {to}, or no such tensor",
                next="compile a plan for this checkpoint: it keeps the two apart, as from_pretrained does",
            )


def parameter_faults(
    parameter: Parameter, shape: tuple[int, ...], tensors: Mapping[str, TensorEntry], next_step: str = COMPILE_AGAIN
) -> Iterator[Fault]:
    """What is wrong with the tensors that make up one parameter.

    Args:
        parameter: a parameter whose name has no braces.
        shape: the shape that its tensors must make up.
        tensors: the tensors on disk, by name.
        next_step: what the user is told to do.
    """
    sources = parameter.sources
    if sources is None:
        on_disk = exchanged(shape) if parameter.transposed else shape
        yield from _differing(parameter.names_on_disk(), on_disk, parameter.dtype, tensors, next_step)
        return
    found: list[tuple[int, ...]] = []
    for position in range(len(sources.names)):
        names = parameter.names_on_disk()[position :: len(sources.names)]
        first = next((tensors[name].shape for name in names if name in tensors), None)
        if first is not None:
            found.append(first)
        yield from _differing(names, first, parameter.dtype, tensors, next_step)
    if len(found) == len(sources.names) and assembled_shape(found, sources.count, sources.stacked) != shape:
        got = " and ".join(f"{name} {list(one)}" for name, one in zip(sources.names, found))
        yield _differs(parameter.name, got, f"tensors that make up {parameter.dtype} of {list(shape)}", next_step)


def assembled_shape(shapes: Sequence[tuple[int, ...]], count: int, stacked: bool) -> tuple[int, ...] | None:
    """The shape of the parameter that several tensors make up.

    Args:
        shapes: the shapes of the tensors that are concatenated along dimension 0.
        count: how many such groups there are.
        stacked: whether the groups are stacked along a new dimension 0.

    Returns:
        The shape; None when the tensors differ in more than dimension 0.
    """
    first = shapes[0]
    if len(shapes) > 1:
        if not all(shape and shape[1:] == first[1:] for shape in (*shapes, first)):
            return None
        first = (sum(shape[0] for shape in shapes), *first[1:])
    return (count, *first) if stacked else first


def exchanged(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape of two or more dimensions with the last two exchanged."""
    return (*shape[:-2], shape[-1], shape[-2])


def config_faults(
    plan: Plan, found: dict[str, Any] | None, folder: Path, next_step: str = "compile a plan for this checkpoint"
) -> list[Fault]:
    """Whether a config.json is the one the plan was compiled from, as far as a plan holds it.

    Args:
        plan: the plan.
        found: the config; None where there is none.
        folder: where it is.
        next_step: what the user is told to do.
    """
    config, planned = config_hash(found), config_hash(plan.model.config)
    if config == planned:
        return []
    return [
        Fault(
            code="another-config",
            what="config.json is not the one the plan was compiled from",
            where=str(folder / CONFIG_NAME),
            got=config or "no config.json",
            expected=planned or "no config.json",
            next=next_step,
        )
    ]


def _unplanned_faults(plan: Plan, checkpoint: Checkpoint) -> list[Fault]:
    planned = {name for parameter in plan.expanded() for name in parameter.names_on_disk()}
    tied = {tie.name for tie in plan.tied}
    ignored = NameSet(plan.ignored)
    return _folded(
        Fault(
            code="tensor-unknown",
            what="the checkpoint has a tensor that the plan does not know",
            where=name,
            expected="the plan's tensors only",
            next="compile a plan for this checkpoint",
        )
        for name in checkpoint.tensors.keys() - planned - tied
        if name not in ignored
    )


def _differing(
    names: Sequence[str],
    shape: tuple[int, ...] | None,
    dtype: str,
    tensors: Mapping[str, TensorEntry],
    next_step: str,
) -> Iterator[Fault]:
    expected = f"{dtype} of {list(shape)}" if shape is not None else f"a tensor of {dtype}"
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:
            yield Fault(
                code="tensor-missing",
                what="a tensor of the plan is missing",
                where=name,
                expected=expected,
                next=next_step,
            )
        elif (tensor.shape, tensor.dtype) != (shape, dtype):
            got = f"{tensor.dtype} of {list(tensor.shape)}"
            yield _differs(name, got, expected, next_step)


def _differs(name: str, got: str, expected: str, next_step: str) -> Fault:
    what = "a tensor is not what the plan says"
    return Fault(code="tensor-differs", what=what, where=name, got=got, expected=expected, next=next_step)


def _folded(faults: Iterable[Fault]) -> list[Fault]:
    """Faults that many layers have in common, made one."""
    names: dict[Fault, list[str]] = defaultdict(list)
    for fault in faults:
        names[replace(fault, where="")].append(fault.where)
    return [replace(fault, where=where) for fault, found in names.items() for where in fold(dict.fromkeys(found))]
