"""The entries of a plan, and the plan as their sum: typed values without checks, files or fingerprints.

`schemas.plan.validate` says in what they can contradict each other; `schemas.plan.document` reads and writes them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.rule_ref import RuleRef
from autotp_plan.schemas.plan.rules import Rules
from autotp_plan.schemas.plan.stamp import Stamp

VERSION = "1.0"
MAX_TP_SIZE = 65536

Style = Literal["column", "row", "vocab", "shard", "replicated"]
Operation = Literal["copy", "reduce", "split"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A commit of a repository of the hub, and the folder in it that holds the model; empty for the top."""

    name: str
    commit: str
    folder: str = ""

    def __str__(self) -> str:
        return f"hf://{self.name}@{self.commit}" + (f"/{self.folder}" if self.folder else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model a plan is for: names, its config (without the keys that no layout depends on), and a hash of its
    parameters.

    `repository` says where on the hub it was compiled from. It does not tell plans apart: the same model in a folder,
    or at another commit, has the same plan.
    """

    model_type: str | None
    architecture: str | None
    config: dict[str, Any] | None
    inventory: str
    repository: Repository | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The tensors on disk whose bytes, one after the other, are a parameter's.

    For each number below `count`, for each of `names` in order: the tensor whose name has the number for `*`. Names
    without `*` are single tensors, concatenated.
    """

    names: tuple[str, ...]
    count: int = 1

    @property
    def stacked(self) -> bool:
        """Whether the tensors are stacked along a new dimension 0, and not concatenated along theirs."""
        return any("*" in name for name in self.names)

    def expanded(self) -> Iterator[Sources]:
        """One `Sources` for each of the parameters that names with braces stand for."""
        for names in zip(*map(expand, self.names)):
            yield dataclasses.replace(self, names=names)

    def names_on_disk(self) -> tuple[str, ...]:
        """The name of every tensor, in the order of the bytes."""
        return tuple(name.replace("*", str(number)) for number in range(self.count) for name in self.names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One module parameter, or one of several layers when `name` has braces. `layout` is the name of a layout.

    Its name on disk is `source` where that differs; a parameter that is several tensors on disk has `sources`. One that
    is `transposed` has its last two dimensions exchanged there, in a checkpoint; shards hold it as the module does.
    """

    name: str
    layout: str
    dtype: str
    style: Style
    rule: RuleRef
    shape: tuple[int, ...] | None = None
    gather_output: bool = False
    partial_gradient: bool = False
    add_once: bool = False
    split_input: bool = False
    source: str | None = None
    sources: Sources | None = None
    transposed: bool = False

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
    rule: RuleRef
    gather_output: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleAttribute:
    """An attribute of a module (of several when `module` has braces) and its value on each TP rank."""

    module: str
    attribute: str
    values: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """The collective at one input or output of a module.

    `copy` all-reduces the gradient of the tensor (of `interval` of its last dimension, or of all of it), `reduce`
    all-reduces the tensor itself, `split` takes each rank's `intervals` of the `size` things that dimension `dim`
    counts.
    """

    operation: Operation
    interval: iv.Interval | None = None
    dim: int | None = None
    size: int | None = None
    intervals: tuple[iv.Intervals, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModule:
    """A module (several when `module` has braces) that gets collectives at its inputs and output.

    `buffers` are sharded in the last dimension by the layout of a parameter in the module.
    """

    module: str
    inputs: dict[str, Crossing] = field(default_factory=dict)
    output: Crossing | None = None
    mean_over_ranks: bool = False
    buffers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceParallel:
    """Where the residual stream is sharded along the sequence. Names of modules, braces as in parameter names.

    Attributes:
        layers: the layers; the stream is sharded in front of the first.
        gather: modules that need every token: an all-gather of their first input.
        scatter: modules behind which each rank has its tokens again: of a row-parallel layer the sum over the ranks is
            a reduce-scatter; of others, whose output every rank has, each rank takes its tokens.
        end: the last module of the sharded stream; its output is all-gathered.
    """

    layers: tuple[str, ...]
    gather: tuple[str, ...]
    scatter: tuple[str, ...]
    end: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dequantization:
    """How the weights are quantised in the checkpoint, and the dtype that they have in the plan and in shards.

    `method` is `quant_method` of the config; `block` are the rows and columns that have one scale, where the config
    says so.
    """

    method: str
    dtype: str
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        blocks = "" if self.block is None else " in blocks of {} x {}".format(*self.block)
        return f"{self.method}{blocks}, which become {self.dtype}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeOptions:
    """What a DeepSpeed config asked of the runtime."""

    dtype: str | None = None
    tp_overlap_comm: bool = False


NOT_READ = " Not read: "
"""What notes say of weights that lie next to those of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntries:
    """Everything that a plan holds. `parameters` are folded over layers; `expanded()` gives one per parameter."""

    version: str = VERSION
    model: ModelIdentity
    tp_size: int
    layouts: dict[str, Layout]
    parameters: tuple[Parameter, ...]
    module_attributes: tuple[ModuleAttribute, ...] = ()
    modules: tuple[PlannedModule, ...] = ()
    sequence_parallel: SequenceParallel | None = None
    tied: tuple[Tie, ...] = ()
    ignored: tuple[str, ...] = ()
    dequantize: Dequantization | None = None
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    notes: tuple[str, ...] = ()
    rules: Rules | None = field(default=None, compare=False)
    verified: Stamp | None = None

    def expanded(self) -> Iterator[Parameter]:
        """One `Parameter` per module parameter, in the plan's order."""
        for entry in self.parameters:
            one = itertools.repeat(None) if entry.source is None else expand(entry.source)
            many = itertools.repeat(None) if entry.sources is None else entry.sources.expanded()
            for name, source, sources in zip(expand(entry.name), one, many):
                yield dataclasses.replace(entry, name=name, source=source, sources=sources)

    @property
    def dequantized_dtype(self) -> str | None:
        """What weights become that are quantised in the checkpoint; None where none are."""
        return None if self.dequantize is None else self.dequantize.dtype

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """The full shape of a parameter of this plan."""
        return parameter.shape if parameter.shape is not None else self.layouts[parameter.layout].shape
