"""What a transformers model's parameters are called in checkpoints, and which of its names are tied."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from autotp_plan.huggingface.internals import checkpoint_conversions, unused_names
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.planner.model.tensor_names import DiskNames, ToMemory
from autotp_plan.schemas.names import BELOW, fold, starred
from autotp_plan.schemas.spec import TieSpec


def ties(model: Any) -> Iterator[TieSpec]:
    """The names of `model` that are second names of a parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            yield TieSpec(name=name, to=other)


def disk_names(model: Any) -> tuple[dict[str, str], dict[str, tuple[str, ...]], list[str]]:
    """What `model`'s parameters are called in checkpoints, by transformers' conversion tables.

    Returns:
        `renamed_tensors` and `assembled_tensors` as in a spec file, and a line for each parameter that is neither.
    """
    conversions, on_disk = checkpoint_conversions(model)
    renamed: dict[str, str] = {}
    assembled: dict[str, tuple[str, ...]] = {}
    odd: list[str] = []
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        conversion = next((one for one in conversions if any(target in name for target in one.targets)), None)
        if conversion is None:
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
    return renamed, assembled, sorted(set(odd))


def unused_tensors(
    model: Any, renamed: Mapping[str, str], assembled: Mapping[str, tuple[str, ...]], on_disk: Collection[str]
) -> list[str]:
    """The tensors of a checkpoint that `model` does not use, and that transformers says it does not.

    Args:
        model: a transformers model.
        renamed: from `disk_names`.
        assembled: from `disk_names`.
        on_disk: the names of the checkpoint's tensors.

    Returns:
        names on disk; `mtp.**` where nothing below a name is used. A tensor that becomes a parameter of `model` is not
        among them, whatever transformers' patterns match.
    """
    patterns = [re.compile(pattern) for pattern in unused_names(model)]
    known = {name for name, _ in parameters_and_buffers(model)}
    to_memory = ToMemory(DiskNames(renamed=renamed, assembled=assembled), on_disk)
    unused, used = [], set[str]()
    for name in on_disk:
        role = to_memory.role(name)
        if role is not None and role.parameter not in known and any(pattern.search(name) for pattern in patterns):
            unused.append(name)
        else:
            used.update(_prefixes(name))
    return fold({next((f"{one}{BELOW}" for one in _prefixes(name) if one not in used), name) for name in unused})


def _prefixes(name: str) -> list[str]:
    """The modules that a name is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


_BYTE_CONCATENATIONS: tuple[tuple[tuple[str, int | None], ...], ...] = (
    (("MergeModulelist", 0),),
    (("MergeModulelist", 0), ("Concatenate", 1)),
    (("Concatenate", 0),),
)
"""Conversions whose result has the bytes of its sources one after the other."""
