"""Tensors of a checkpoint that its model does not use, by what transformers says: layers for multi-token prediction."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from autotp_plan.huggingface.internals import unused_names
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.planner.model.tensor_names import DiskNames, ToMemory
from autotp_plan.schemas.names import BELOW, fold
from autotp_plan.schemas.spec import SpecFile


def with_unused_tensors(rules: SpecFile, model: ModelInput) -> SpecFile:
    """`rules` that ignore the tensors of the model's checkpoint that it does not use."""
    if model.checkpoint is None:
        return rules
    unused = unused_tensors(
        model.module, rules.renamed_tensors, rules.assembled_tensors, tuple(model.checkpoint.tensors)
    )
    return dataclasses.replace(rules, ignored_tensors=(*rules.ignored_tensors, *unused))


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
