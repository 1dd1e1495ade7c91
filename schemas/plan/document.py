"""The plan document: which part of which parameter each TP rank holds, and how each module runs.

A `Plan` that exists is consistent: its schema, version, fingerprint, references and interval arithmetic were checked
when it was read. Whether it fits a checkpoint, a model or a training job is for others to say.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autotp_plan.schemas import documents
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import DocumentError, Fault
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.stamp import Stamp
from autotp_plan.schemas.plan.validate import plan_faults

FORMAT = "autotp-plan"
VERSION = "1.0"
MAX_TP_SIZE = 65536

Style = Literal["column", "row", "vocab", "shard", "replicated"]
Operation = Literal["copy", "reduce", "split"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model a plan is for: names, its config (without the keys that no layout depends on), and a hash of its
    parameters.
    """

    model_type: str | None
    architecture: str | None
    config: dict[str, Any] | None
    inventory: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelIdentity:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The tensors on disk whose bytes, one after the other, are a parameter's.

    For each number below `count`, for each of `names` in order: the tensor whose name has the number for `*`. Names
    without `*` are tensors of their own, concatenated.
    """

    names: tuple[str, ...]
    count: int = 1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sources:
        return cls(**{**data, "names": tuple(data["names"])})

    def to_dict(self) -> dict[str, Any]:
        return {**_without_defaults(self), "names": list(self.names)}

    @property
    def stacked(self) -> bool:
        """Whether the tensors are stacked along a new dimension 0, and not concatenated along theirs."""
        return any("*" in name for name in self.names)

    def expanded(self) -> Iterator[Sources]:
        """One `Sources` for each of the alike parameters that names with braces stand for."""
        for names in zip(*map(expand, self.names)):
            yield dataclasses.replace(self, names=names)

    def names_on_disk(self) -> tuple[str, ...]:
        """The name of every tensor, in the order of the bytes."""
        return tuple(name.replace("*", str(number)) for number in range(self.count) for name in self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One module parameter, or several alike ones when `name` has braces. `layout` is the name of a layout.

    Its name on disk is `source` where that differs; a parameter that is several tensors on disk has `sources`.
    """

    name: str
    layout: str
    dtype: str
    style: Style
    rule: str
    shape: tuple[int, ...] | None = None
    gather_output: bool = False
    partial_gradient: bool = False
    add_once: bool = False
    split_input: bool = False
    source: str | None = None
    sources: Sources | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Parameter:
        shape, sources = data.get("shape"), data.get("sources")
        return cls(
            **{
                **data,
                "shape": None if shape is None else tuple(shape),
                "sources": None if sources is None else Sources.from_dict(sources),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        data = _without_defaults(self)
        if self.shape is not None:
            data["shape"] = list(self.shape)
        if self.sources is not None:
            data["sources"] = self.sources.to_dict()
        return data

    def names_on_disk(self) -> tuple[str, ...]:
        """The tensors on disk of a single parameter (no braces), in the order of its bytes."""
        if self.sources is not None:
            return self.sources.names_on_disk()
        return (self.name if self.source is None else self.source,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tie:
    """A second name of a parameter: the module that uses it under `name` runs in `style`."""

    name: str
    to: str
    style: Style
    rule: str
    gather_output: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tie:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return _without_defaults(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleAttribute:
    """An attribute of a module (or of several alike ones) and its value on each TP rank."""

    module: str
    attribute: str
    values: tuple[int, ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModuleAttribute:
        return cls(**{**data, "values": tuple(data["values"])})

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "values": list(self.values)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """What is done to a tensor that enters or leaves a module.

    `copy` sums its gradient over the ranks (of `interval` of its last dimension, or of all of it), `reduce` sums the
    tensor itself, `split` takes each rank's `intervals` of the `size` things that dimension `dim` counts.
    """

    operation: Operation
    interval: iv.Interval | None = None
    dim: int | None = None
    size: int | None = None
    intervals: tuple[iv.Intervals, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Crossing:
        interval = data.get("interval")
        intervals = tuple(tuple((start, stop) for start, stop in rank) for rank in data.get("intervals", ()))
        return cls(**{**data, "interval": None if interval is None else (interval[0], interval[1]),
                      "intervals": intervals})  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        data = _without_defaults(self)
        if self.interval is not None:
            data["interval"] = list(self.interval)
        if self.intervals:
            data["intervals"] = [[list(interval) for interval in rank] for rank in self.intervals]
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModule:
    """A module (or several alike ones) that keeps its own forward and meets the other ranks."""

    module: str
    inputs: dict[str, Crossing] = field(default_factory=dict)
    output: Crossing | None = None
    mean_over_ranks: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlannedModule:
        output = data.get("output")
        inputs = {name: Crossing.from_dict(crossing) for name, crossing in data.get("inputs", {}).items()}
        return cls(**{**data, "inputs": inputs, "output": None if output is None else Crossing.from_dict(output)})

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"module": self.module}
        if self.inputs:
            data["inputs"] = {name: crossing.to_dict() for name, crossing in self.inputs.items()}
        if self.output is not None:
            data["output"] = self.output.to_dict()
        return {**data, "mean_over_ranks": True} if self.mean_over_ranks else data


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeOptions:
    """What a DeepSpeed config asked of the runtime."""

    dtype: str | None = None
    tp_overlap_comm: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RuntimeOptions:
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return _without_defaults(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan. `parameters` are the folded entries; `expanded()` gives one per module parameter."""

    model: ModelIdentity
    tp_size: int
    layouts: dict[str, Layout]
    parameters: tuple[Parameter, ...]
    module_attributes: tuple[ModuleAttribute, ...] = ()
    modules: tuple[PlannedModule, ...] = ()
    tied: tuple[Tie, ...] = ()
    ignored: tuple[str, ...] = ()
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    notes: tuple[str, ...] = ()
    verified: Stamp | None = None
    version: str = VERSION

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in `path`. Raises DocumentError with every fault found."""
        return cls.from_dict(documents.read_json(path, "plan"))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that the JSON value `data` is. Raises DocumentError with every fault found."""
        _check_version(data)
        documents.validate(data, "plan", "plan")
        plan = cls(
            model=ModelIdentity.from_dict(data["model"]),
            tp_size=data["tp_size"],
            layouts={name: Layout.from_dict(layout) for name, layout in data["layouts"].items()},
            parameters=tuple(Parameter.from_dict(entry) for entry in data["parameters"]),
            module_attributes=tuple(ModuleAttribute.from_dict(entry) for entry in data.get("module_attributes", ())),
            modules=tuple(PlannedModule.from_dict(entry) for entry in data.get("modules", ())),
            tied=tuple(Tie.from_dict(entry) for entry in data.get("tied", ())),
            ignored=tuple(data.get("ignored", ())),
            runtime=RuntimeOptions.from_dict(data.get("runtime", {})),
            notes=tuple(data.get("notes", ())),
            verified=Stamp.from_dict(data["verified"]) if "verified" in data else None,
            version=data["version"],
        )
        faults = _fingerprint_faults(data) + list(plan_faults(plan))
        if faults:
            raise DocumentError(faults)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of the plan, fingerprint included."""
        data = {**self._fingerprinted(), "fingerprint": self.fingerprint}
        return data if self.verified is None else {**data, "verified": self.verified.to_dict()}

    def to_json(self) -> str:
        """The text of a plan file: the same plan gives the same bytes."""
        return documents.format_json(self.to_dict(), width=220)

    @functools.cached_property
    def fingerprint(self) -> str:
        """`sha256:` and the SHA-256 of all that decides what a rank holds; hashed once, as a plan never changes."""
        return documents.fingerprint(self._fingerprinted())

    def _fingerprinted(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "model": self.model.to_dict(),
            "tp_size": self.tp_size,
            "layouts": {name: layout.to_dict() for name, layout in self.layouts.items()},
            "parameters": [parameter.to_dict() for parameter in self.parameters],
            "module_attributes": [attribute.to_dict() for attribute in self.module_attributes],
            "modules": [module.to_dict() for module in self.modules],
            "tied": [tie.to_dict() for tie in self.tied],
            "ignored": list(self.ignored),
            "runtime": self.runtime.to_dict(),
            "notes": list(self.notes),
        }
        for key in ("module_attributes", "modules", "tied", "ignored", "runtime", "notes"):
            if not data[key]:
                del data[key]
        return data

    def expanded(self) -> Iterator[Parameter]:
        """One `Parameter` per module parameter, in the plan's order."""
        for entry in self.parameters:
            one = itertools.repeat(None) if entry.source is None else expand(entry.source)
            many = itertools.repeat(None) if entry.sources is None else entry.sources.expanded()
            for name, source, sources in zip(expand(entry.name), one, many):
                yield dataclasses.replace(entry, name=name, source=source, sources=sources)

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """The full shape of a parameter of this plan."""
        return parameter.shape if parameter.shape is not None else self.layouts[parameter.layout].shape


def _without_defaults(document: Any) -> dict[str, Any]:
    return {
        spec.name: getattr(document, spec.name)
        for spec in dataclasses.fields(document)
        if getattr(document, spec.name) != spec.default
    }


def _check_version(data: Any) -> None:
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, str) or version.split(".")[0] == VERSION.split(".")[0]:
        return  # the schema says the rest
    raise DocumentError(
        Fault(
            what="the plan is of another format version",
            where="version",
            got=version,
            expected=f"{VERSION.split('.')[0]}.x",
            next="compile the plan again with this version of autotp-plan, or install the version that wrote it",
        )
    )


def _fingerprint_faults(data: dict[str, Any]) -> list[Fault]:
    covered = {key: value for key, value in data.items() if key not in ("fingerprint", "verified")}
    actual = documents.fingerprint(covered)
    proved = data.get("verified", {}).get("plan", actual)
    if actual == data["fingerprint"] == proved:
        return []
    if actual == data["fingerprint"]:
        return [
            Fault(
                what="the plan bears the stamp of another plan",
                where="verified.plan",
                got=proved,
                expected=actual,
                next="remove the key `verified`, then run `autotp-plan verify`",
            )
        ]
    return [
        Fault(
            what="the plan was changed after it was compiled",
            where="fingerprint",
            got=data["fingerprint"],
            expected=actual,
            next="change the spec, not the plan, and compile again",
        )
    ]
