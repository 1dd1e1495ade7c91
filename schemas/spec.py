"""The spec document: rules that say how parameters are cut, as a user or a preset writes them.

Sizes are kept as written (integers or expressions); nothing here resolves them or knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from autotp_plan.schemas import documents

Size = int | str
PartitionType = Literal["column", "row", "vocab", "skip"]
Indivisible = Literal["error", "uneven", "replicate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One rule: which parameters, and how they are cut. Fields as in spec.schema.json."""

    patterns: tuple[str, ...]
    partition_type: PartitionType = "column"
    shape: tuple[Size | tuple[Size, ...], ...] | None = None
    partition_dim: int | None = None
    model_types: tuple[str, ...] | None = None
    gather_output: bool = False
    grad_allreduce: bool = False
    unit: Size | tuple[Size, ...] | None = None
    indivisible: Indivisible = "error"
    optional: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spec:
        shape, unit, types = data.get("shape"), data.get("unit"), data.get("model_types")
        return cls(
            **{
                **data,
                "patterns": tuple(data["patterns"]),
                "partition_type": cast(PartitionType, data.get("partition_type", "column").lower()),
                "shape": None if shape is None else tuple(tuple(s) if isinstance(s, list) else s for s in shape),
                "model_types": tuple(types) if types else None,
                "unit": tuple(unit) if isinstance(unit, list) else unit,
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeSpec:
    """Attributes of the modules that `patterns` match, each with an expression for its rank-local value."""

    patterns: tuple[str, ...]
    attributes: dict[str, Size]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttributeSpec:
        return cls(patterns=tuple(data["patterns"]), attributes=dict(data["attributes"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class TieSpec:
    """`name` is the parameter `to` under a second name, when the config key `when` is true (None: always)."""

    name: str
    to: str
    when: str | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TieSpec:
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecFile:
    """A spec file or preset as it was written."""

    name: str | None = None
    description: str = ""
    model_types: tuple[str, ...] = ()
    use_default_specs: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)
    symbols: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    num_layers: Size | None = None
    layer_specs: tuple[Spec, ...] = ()
    vocabulary_specs: tuple[Spec, ...] = ()
    module_attributes: tuple[AttributeSpec, ...] = ()
    tied: tuple[TieSpec, ...] = ()
    ignored_tensors: tuple[str, ...] = ()
    renamed_tensors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> SpecFile:
        """The spec file in `path`. Raises DocumentError with every fault found."""
        return cls.from_dict(documents.read_json(path, "spec file"))

    @classmethod
    def from_dict(cls, data: Any, kind: str = "spec file") -> SpecFile:
        """The spec file that the JSON value `data` is. Raises DocumentError with every fault found."""
        documents.validate(data, "spec", kind)
        return cls(
            name=data.get("name"),
            description=data.get("description", ""),
            model_types=tuple(data.get("model_types", ())),
            use_default_specs=data.get("use_default_specs", True),
            defaults=data.get("defaults", {}),
            symbols={
                name: tuple(size) if isinstance(size, list) else (size,)
                for name, size in data.get("symbols", {}).items()
            },
            num_layers=data.get("num_layers"),
            layer_specs=tuple(Spec.from_dict(entry) for entry in data.get("layer_specs", ())),
            vocabulary_specs=tuple(Spec.from_dict(entry) for entry in data.get("vocabulary_specs", ())),
            module_attributes=tuple(AttributeSpec.from_dict(entry) for entry in data.get("module_attributes", ())),
            tied=tuple(TieSpec.from_dict(entry) for entry in data.get("tied", ())),
            ignored_tensors=tuple(data.get("ignored_tensors", ())),
            renamed_tensors=data.get("renamed_tensors", {}),
        )
