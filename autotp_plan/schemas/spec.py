"""The spec document: rules that say how parameters are sharded, as a user or a preset writes them.

Sizes are kept as written (integers or expressions); nothing here resolves them or knows a model.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from autotp_plan.schemas import documents
from autotp_plan.schemas.codec import decode, encode
from autotp_plan.schemas.errors import DocumentError, Fault

Size = int | str
PartitionType = Literal["column", "row", "vocab", "shard", "skip"]
Indivisible = Literal["error", "uneven", "replicate"]
Operation = Literal["copy", "reduce", "split"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One rule: which parameters, and how they are sharded. Fields as in spec.schema.json."""

    patterns: tuple[str, ...]
    partition_type: PartitionType = "column"
    shape: tuple[Size | tuple[Size, ...], ...] | None = None
    partition_dim: int | None = None
    model_types: tuple[str, ...] | None = None
    gather_output: bool = False
    grad_allreduce: bool = False
    unit: Size | tuple[Size, ...] | None = None
    indivisible: Indivisible | tuple[Indivisible, ...] = "error"
    add_once: bool = False
    split_input: bool = False
    optional: bool = False
    when: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeSpec:
    """Attributes of the modules that `patterns` match, each with an expression for its rank-local value."""

    patterns: tuple[str, ...]
    attributes: dict[str, Size]
    when: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossingSpec:
    """The collective at one input or output of a module. Written as `"copy"`, or as an object.

    `copy` leaves the tensor as it is and all-reduces its gradient, all of it or `[start, stop)` of its last dimension;
    `reduce` all-reduces the tensor; `split` takes this rank's share of the `size` things that dimension `dim` counts.
    """

    operation: Operation
    interval: tuple[Size, Size] | None = None
    size: Size | None = None
    dim: int = 0
    unit: Size = 1

    @classmethod
    def from_value(cls, value: Any) -> CrossingSpec:
        """The collective that a spec file writes as `value`."""
        if isinstance(value, str):
            return cls(operation=cast(Operation, value))
        if "copy" in value:
            start, stop = value["copy"]
            return cls(operation="copy", interval=(start, stop))
        return cls(operation="split", size=value["split"], dim=value.get("dim", 0), unit=value.get("unit", 1))

    def to_value(self) -> Any:
        """What a spec file writes."""
        if self.operation == "split":
            return {"split": self.size, "dim": self.dim, "unit": self.unit}
        return self.operation if self.interval is None else {"copy": list(self.interval)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """Collectives that modules get at their inputs and output, and whether they average over all ranks.

    `buffers` are sharded in the last dimension as a parameter in the module is.
    """

    patterns: tuple[str, ...]
    inputs: dict[str, CrossingSpec] = field(default_factory=dict)
    output: CrossingSpec | None = None
    mean_over_ranks: bool = False
    buffers: dict[str, str] = field(default_factory=dict)
    when: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TieSpec:
    """`name` is a second name of the parameter `to`, when the config key `when` is true (None: always)."""

    name: str
    to: str
    when: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecFile:
    """A spec file or preset as it was written."""

    name: str | None = None
    description: str = ""
    model_types: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    deepspeed_presets: dict[str, str] = field(default_factory=dict)
    use_default_specs: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)
    symbols: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    num_layers: Size | None = None
    layer_specs: tuple[Spec, ...] = ()
    vocabulary_specs: tuple[Spec, ...] = ()
    module_attributes: tuple[AttributeSpec, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    tied: tuple[TieSpec, ...] = ()
    ignored_tensors: tuple[str, ...] = ()
    ignored_layers: dict[str, Size] = field(default_factory=dict)
    renamed_tensors: dict[str, str] = field(default_factory=dict)
    assembled_tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transposed_tensors: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    base_model_prefix: str | None = None
    renamed_prefixes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SpecFile:
        """The spec file in `path`.

        Raises:
            DocumentError: with every fault found.
        """
        return cls.from_dict(documents.read_json(Path(path), "spec file"))

    @classmethod
    def from_dict(cls, data: Any, kind: str = "spec file") -> SpecFile:
        """The spec file that the JSON value `data` is.

        Args:
            data: as parsed.
            kind: what messages call it.

        Raises:
            DocumentError: with every fault found.
        """
        documents.validate(data, "spec", kind)
        faults = list(_name_faults(data.get("renamed_tensors", {}), data.get("assembled_tensors", {})))
        if faults:
            raise DocumentError(faults)
        return decode(cls, _normalised(data))

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of the spec file, without what has its default."""
        found: dict[str, Any] = encode(self)
        return found


def _normalised(data: dict[str, Any]) -> dict[str, Any]:
    """A spec file with one way of writing each thing: rules in DeepSpeed's words, symbols as lists of candidates."""
    normal = {key: value for key, value in data.items() if key != "$schema"}
    for key in ("layer_specs", "vocabulary_specs"):
        if key in data:
            normal[key] = [_normalised_rule(rule) for rule in data[key]]
    symbols: dict[str, Any] = data.get("symbols", {})
    normal["symbols"] = {name: size if isinstance(size, list) else [size] for name, size in symbols.items()}
    return normal


def _normalised_rule(rule: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed reads `partition_type` in any case, and an empty list of model types as all of them."""
    normal = {**rule, "partition_type": rule.get("partition_type", "column").lower()}
    return {**normal, "model_types": rule.get("model_types") or None}


def _name_faults(renamed: dict[str, str], assembled: dict[str, list[str]]) -> Iterator[Fault]:
    """What is wrong with the `*` of names, and names on disk that are used twice."""
    for disk, name in renamed.items():
        if _num_stars(disk) != _num_stars(name) or None in (_num_stars(disk), _num_stars(name)):
            expected = "as many * as in the name on disk, each for a whole number"
            yield _name_fault(f"renamed_tensors.{disk}", name, expected)
    for name, disks in assembled.items():
        counts = {_num_stars(disk) for disk in disks}
        stars = _num_stars(name)
        if None in counts or stars is None or counts not in ({stars}, {stars + 1}):
            got = f"{name} of {', '.join(disks)}"
            expected = "as many * in every name on disk: as the parameter has, or one more to stack them"
            yield _name_fault(f"assembled_tensors.{name}", got, expected)
    used = Counter([*renamed, *(disk for disks in assembled.values() for disk in disks)])
    for disk, count in used.items():
        if count > 1:
            yield _name_fault("assembled_tensors", f"{disk} in {count} places", "each name on disk once")


def _num_stars(name: str) -> int | None:
    """How many numbers `*` stands for in a name; None when a `*` is only part of a component."""
    count = name.split(".").count("*")
    return count if count == name.count("*") else None


def _name_fault(where: str, got: str, expected: str) -> Fault:
    return Fault(
        code="disk-names",
        what="names on disk and in the model do not fit together",
        where=where,
        got=got,
        expected=expected,
        next="write * for each number: model.layers.*.mlp.experts.*.up_proj.weight",
    )
