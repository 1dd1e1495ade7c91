"""What a transformers model's parameters are called in checkpoints, and which of its names are tied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from autotp_plan.huggingface.internals import checkpoint_conversions
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.names import starred
from autotp_plan.schemas.spec import TieSpec


def ties(model: Any) -> Iterator[TieSpec]:
    """The names of `model` that are second names of a parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            yield TieSpec(name=name, to=other)


class NamesOnDisk(NamedTuple):
    """What a model's parameters are called in checkpoints: three keys of a spec file, and what is none of these."""

    renamed: dict[str, str]
    assembled: dict[str, tuple[str, ...]]
    transposed: dict[str, tuple[int, ...]]
    odd: list[str]


def disk_names(model: Any) -> NamesOnDisk:
    """What `model`'s parameters are called in checkpoints, by transformers' conversion tables.

    Returns:
        `renamed_tensors`, `assembled_tensors` and `transposed_tensors` as in a spec file, and a line for each parameter
        that is in another way made of tensors on disk.
    """
    conversions, on_disk = checkpoint_conversions(model)
    renamed: dict[str, str] = {}
    assembled: dict[str, tuple[str, ...]] = {}
    transposed: dict[str, tuple[int, ...]] = {}
    odd: list[str] = []
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        conversion = next((one for one in conversions if any(target in name for target in one.targets)), None)
        if conversion is None:
            disk = on_disk(name)
            if disk != name:
                renamed[starred(disk)] = starred(name)
            continue
        if conversion.exchanges and conversion.sources == conversion.targets and len(shapes.get(name, ())) == 3:
            transposed[starred(name)] = (-1, *shapes[name][1:])
            disk = on_disk(name)
            if disk != name:
                renamed[starred(disk)] = starred(name)
            continue
        if conversion.operations not in _BYTE_CONCATENATIONS:
            odd.append(f"{starred(name)}: {', '.join(operation for operation, _ in conversion.operations)}")
            continue
        target = next(target for target in conversion.targets if target in name)
        sources = [on_disk(name.replace(target, source)) for source in conversion.sources]
        assembled[starred(name)] = tuple(map(starred, sources))
    return NamesOnDisk(renamed, assembled, transposed, sorted(set(odd)))


def known_disk_names(model: Any, where: str) -> NamesOnDisk:
    """`disk_names`, where every parameter is one of the first three.

    Args:
        model: a transformers model.
        where: what faults point to.

    Raises:
        CompileError: a parameter is in another way made of tensors on disk.
    """
    names = disk_names(model)
    if names.odd:
        raise CompileError(unsupported(names.odd, where))
    return names


def unsupported(odd: list[str], where: str) -> Fault:
    """The fault of tensors that become parameters in another way than `disk_names` can say."""
    return Fault(
        code="unsupported-conversion",
        what="the checkpoint's tensors become parameters in a way that byte ranges cannot express",
        where=where,
        got=", ".join(odd),
        expected="stacking (MergeModulelist), concatenation along the rows, or last dimensions exchanged",
        next="load and save the model in memory form, or wait for a preset",
    )


_BYTE_CONCATENATIONS: tuple[tuple[tuple[str, int | None], ...], ...] = (
    (("MergeModulelist", 0),),
    (("MergeModulelist", 0), ("Concatenate", 1)),
    (("Concatenate", 0),),
)
"""Conversions whose result has the bytes of its sources one after the other."""
