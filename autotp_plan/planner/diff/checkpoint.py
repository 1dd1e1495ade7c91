"""A plan and a model: a checkpoint's tensors and config, or the parameters of a model that there is a config of.

What fits a plan is decided where it is for every command and for loading (`schemas.storage.plan_fit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from autotp_plan.planner.diff.compare import dequantize_fact, side_of
from autotp_plan.planner.diff.differences import Difference, Differences, FieldChange, Kind, Side
from autotp_plan.planner.diff.names import compare_facts, compare_names, compare_values
from autotp_plan.planner.diff.plan_facts import Stated, dtype_fact, fact, shape_fact
from autotp_plan.planner.model.inventory import Inventory
from autotp_plan.schemas.errors import DocumentError, Fault
from autotp_plan.schemas.names import num_names
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.checkpoint import Checkpoint, planned_config
from autotp_plan.schemas.storage.plan_fit import checkpoint_faults

_KINDS: dict[str, Kind] = {"tensor-missing": "removed", "tensor-unknown": "added"}


def compare_checkpoint(plan: Plan, checkpoint: Checkpoint) -> Differences:
    """What a checkpoint has that is not as a plan says: the plan is the old side.

    Args:
        plan: the plan.
        checkpoint: its headers, opened with the plan's `dequantized_dtype`.
    """
    side = Side(headline=_headline(checkpoint), num_parameters=len(checkpoint.tensors))
    config = planned_config(checkpoint.config)
    found = [
        *compare_facts("dequantize", "dequantize", *map(dequantize_fact, (plan.dequantize, checkpoint.dequantize))),
        *compare_values("config", plan.model.config, config),
        *_tensors(plan, checkpoint),
    ]
    return Differences(old=side_of(plan), new=side, found=tuple(found))


def compare_model(plan: Plan, inventory: Inventory) -> Differences:
    """What a model without weights has that is not as a plan says: the plan is the old side.

    Args:
        plan: the plan.
        inventory: the model's parameters, without the tensors that the plan ignores.
    """
    tied = {tie.name for tie in plan.tied}
    planned = (Stated(one.name, (shape_fact(plan.shape_of(one)), dtype_fact(one.dtype))) for one in plan.expanded())
    found = (
        Stated(name, (shape_fact(info.shape), dtype_fact(info.dtype)))
        for name, info in inventory.parameters.items()
        if name not in tied
    )
    dtypes = ", ".join(sorted({info.dtype for info in inventory.parameters.values()}))
    count = len(inventory.parameters)
    model = inventory.architecture or inventory.model_type or "a model"
    return Differences(
        old=side_of(plan),
        new=Side(headline=f"{model}, a config of {count} parameters in {dtypes}", num_parameters=count),
        found=(
            *compare_values("config", plan.model.config, planned_config(inventory.config)),
            *compare_names("parameter", planned, found),
        ),
    )


def turned(differences: Differences) -> Differences:
    """The same differences from the new side to the old one."""
    kinds: dict[Kind, Kind] = {"added": "removed", "removed": "added", "changed": "changed"}
    found = (
        dataclasses.replace(
            one,
            kind=kinds[one.kind],
            fields=tuple(dataclasses.replace(field, old=field.new, new=field.old) for field in one.fields),
        )
        for one in differences.found
    )
    return Differences(old=differences.new, new=differences.old, found=tuple(found))


def _headline(checkpoint: Checkpoint) -> str:
    named = (checkpoint.config or {}).get("architectures")
    model = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "a model without a config"
    dtypes = ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
    return f"{model}, a checkpoint of {len(checkpoint.tensors)} tensors in {dtypes}"


def _tensors(plan: Plan, checkpoint: Checkpoint) -> Iterator[Difference]:
    for fault in checkpoint_faults(plan, checkpoint):
        if fault.code != "another-config":
            yield _difference(fault)


def _difference(fault: Fault) -> Difference:
    """A tensor that is missing, too many or another one."""
    kind = _KINDS.get(fault.code, "changed")
    title = "values" if fault.code == "tied-values-differ" else "tensor"
    old, new = (fact("tensor", text, text, title) if text else None for text in (fault.expected, fault.got))
    if kind == "added":
        old, new = None, fact("tensor", True, "not in the plan", title)
    return Difference(
        of="tensor", name=fault.where, count=_count(fault.where), kind=kind, fields=(FieldChange(old=old, new=new),)
    )


def _count(pattern: str) -> int:
    """How many names a pattern is; the name of a stranger's tensor may have braces that are none."""
    try:
        return num_names(pattern)
    except DocumentError:
        return 1
