"""Where rules come from: spec files, a DeepSpeed config, a preset; in that order of precedence.

A `Source` is a labelled list of rules. This module finds and reads them and says which preset fits a model; it does not
apply a rule to anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from autotp_plan.planner.deepspeed.read_config import TensorParallelSection
from autotp_plan.planner.model.tensor_names import DiskNames
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.schemas.documents import did_you_mean
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.names import BELOW, fold
from autotp_plan.schemas.spec import AttributeSpec, ModuleSpec, Spec, SpecFile

AUTO, NONE = "auto", "none"
MAX_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Rules of one origin. `label` begins a rule's name: `preset llama #1`.

    `trusted` rules know the architecture, and others are held against them, even where they do not decide.
    """

    label: str
    specs: tuple[Spec, ...]
    attributes: tuple[AttributeSpec, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    trusted: bool = False
    decides: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Everything that decides: sources in order of precedence, and the facts about the model they bring along.

    `preset` knows the architecture even where its rules do not decide (`use_default_specs` false).
    """

    sources: tuple[Source, ...]
    files: tuple[SpecFile, ...]
    preset: SpecFile | None
    notes: tuple[str, ...] = ()
    may_fall_back: bool = False

    def with_fallback(self, rules: SpecFile) -> Rules:
        """These rules, and after them those made from transformers' `tp_plan` in the place of a preset."""
        last = Source(label=str(rules.name), specs=rules.layer_specs, modules=rules.modules, trusted=True)
        return dataclasses.replace(self, sources=(*self.sources, last), preset=rules)

    @property
    def facts(self) -> tuple[SpecFile, ...]:
        """The spec files whose symbols, ties and names hold, in order of precedence."""
        return (*self.files, self.preset) if self.preset else self.files

    def symbols(self, config: Mapping[str, Any] | None) -> Symbols:
        """What names mean for a model with `config`."""
        filled: dict[str, Any] = {}
        definitions: dict[str, tuple[int | str, ...]] = {}
        for file in reversed(self.facts):
            filled.update(file.defaults)
            definitions.update(file.symbols)
        filled.update(config or {})
        return Symbols(config=filled, definitions=definitions)

    def num_layers(self, symbols: Symbols) -> int | None:
        """Number of layers, None when no spec file says how to know it. Raises CompileError when it cannot be known."""
        size = next((file.num_layers for file in self.facts if file.num_layers is not None), None)
        try:
            number = None if size is None else symbols.resolve(size)
            if number is not None and not 1 <= number <= MAX_LAYERS:
                raise SymbolError(f"{number} layers")
        except SymbolError as error:
            raise CompileError(
                Fault(
                    what="the number of layers is not known",
                    where="num_layers",
                    got=str(error),
                    expected=f"a size that config.json gives, from 1 to {MAX_LAYERS}",
                    next="correct config.json",
                )
            ) from None
        if number is None and any("*" in name for file in self.facts for name in file.ignored_tensors):
            raise CompileError(
                Fault(
                    what="ignored_tensors has a * for each layer, and the number of layers is not known",
                    where="ignored_tensors",
                    got=", ".join(name for file in self.facts for name in file.ignored_tensors if "*" in name),
                    expected="num_layers beside it",
                    next='add "num_layers": "num_hidden_layers", or a number, to the spec file',
                )
            )
        return number

    def disk_names(self, symbols: Symbols, num_layers: int | None) -> DiskNames:
        """How tensors on disk differ from module parameters."""
        layers = f"{{0..{num_layers - 1}}}" if num_layers else "*"
        renamed: dict[str, str] = {}
        assembled: dict[str, tuple[str, ...]] = {}
        for file in reversed(self.facts):
            renamed.update(file.renamed_tensors)
            assembled.update(file.assembled_tensors)
        base = next((file.base_model_prefix for file in self.facts if file.base_model_prefix), None)
        ignored = {name.replace("*", layers) for file in self.facts for name in file.ignored_tensors}
        for file in self.facts:
            ignored |= set(_layers_past_the_last(file, symbols, num_layers))
        if base:  # a checkpoint may lack the prefix, whichever way the names are written here
            ignored |= {name.removeprefix(f"{base}.") for name in ignored}
            ignored |= {f"{base}.{name}" for name in ignored if not name.startswith(f"{base}.")}
        return DiskNames(
            renamed=renamed,
            assembled=assembled,
            ignored=tuple(sorted(ignored)),
            base_model_prefix=base,
            tied={
                tie.name: tie.to
                for file in reversed(self.facts)
                for tie in file.tied
                if tie.when is None or symbols.config_flag(tie.when)
            },
        )


def _layers_past_the_last(file: SpecFile, symbols: Symbols, num_layers: int | None) -> Iterator[str]:
    for parent, count in file.ignored_layers.items():
        try:
            extra = symbols.resolve(count)
        except SymbolError as error:
            raise CompileError(
                Fault(
                    what="the number of layers past the last is not known",
                    where=f"ignored_layers.{parent}",
                    got=str(error),
                    expected="a size that config.json gives, and num_layers beside it",
                    next="correct the expression, or give the key a default",
                )
            ) from None
        if extra > 0 and num_layers is not None:
            yield from fold(f"{parent}.{layer}{BELOW}" for layer in range(num_layers, num_layers + extra))


def gather(
    model_type: str | None,
    preset: str,
    spec_files: Sequence[SpecFile],
    section: TensorParallelSection | None,
) -> Rules:
    """The rules for a model of `model_type`. `preset` is `auto`, `none` or a name. Raises CompileError."""
    notes: list[str] = []
    partition = section.partition_config if section else None
    where = "--preset"
    if section and section.preset_model and preset == AUTO:
        where = "tensor_parallel.preset_model"
        preset = _preset_of_deepspeed(section.preset_model, model_type, notes)
    found = _find_preset(preset, model_type, notes, where)
    use_default = all(file.use_default_specs for file in spec_files) and (not partition or partition.use_default_specs)
    files = {_label(file, index, len(spec_files)): file for index, file in enumerate(spec_files)}
    if partition:
        files["ds-config"] = partition
    sources = [
        Source(
            label=label,
            specs=file.layer_specs + file.vocabulary_specs,
            attributes=file.module_attributes,
            modules=file.modules,
        )
        for label, file in files.items()
    ]
    if found:
        vocabulary = found.vocabulary_specs
        if section and section.vocab_parallel_lm_head is False:
            vocabulary = tuple(
                Spec(patterns=spec.patterns, partition_type="skip", optional=spec.optional, when=spec.when)
                for spec in vocabulary
            )
        sources += [
            Source(
                label=f"preset {found.name}",
                specs=found.layer_specs,
                attributes=found.module_attributes,
                modules=found.modules,
                trusted=True,
                decides=use_default,
            ),
            Source(label=f"preset {found.name} vocabulary", specs=vocabulary, trusted=True),
        ]
    if section:
        notes.extend(section.notes)
    return Rules(
        sources=tuple(sources),
        files=tuple(files.values()),
        preset=found,
        notes=tuple(notes),
        may_fall_back=preset == AUTO and found is None and use_default,
    )


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    folder = resources.files("autotp_plan.planner.presets")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_preset(name: str) -> SpecFile:
    """The preset called `name`, one of `preset_names()`."""
    return SpecFile.from_dict(json.loads(preset_text(name)), f"preset {name}")


def preset_text(name: str) -> str:
    """The file of the preset called `name`. Raises CompileError."""
    if name not in preset_names():
        raise CompileError(
            Fault(
                what="there is no such preset",
                where="presets show",
                got=name,
                expected=", ".join(preset_names()),
                next=did_you_mean(name, preset_names()) or "see `autotp-plan presets list`",
            )
        )
    return resources.files("autotp_plan.planner.presets").joinpath(f"{name}.json").read_text(encoding="utf-8")


def read_spec_file(path: Path) -> SpecFile:
    """The spec file in `path`, named after the file unless it names itself."""
    return SpecFile.read(path)


def _label(file: SpecFile, index: int, count: int) -> str:
    if file.name:
        return f"spec {file.name}"
    return "spec file" if count == 1 else f"spec file {index + 1}"


def _find_preset(preset: str, model_type: str | None, notes: list[str], where: str = "--preset") -> SpecFile | None:
    if preset == NONE:
        return None
    names = preset_names()
    if preset == AUTO:
        if model_type in names:
            return read_preset(model_type)
        return next((found for found in map(read_preset, names) if model_type in found.model_types), None)
    aliased = [found for found in map(read_preset, names) if preset in found.aliases]
    if aliased and preset not in names:
        return _by_alias(preset, aliased, model_type, notes, where)
    if preset not in names:
        raise CompileError(
            Fault(
                what="there is no such preset",
                where=where,
                got=preset,
                expected="auto, none, " + ", ".join(names),
                next=did_you_mean(preset, names) or "use --preset auto, or write a spec file and use --preset none",
            )
        )
    found = read_preset(preset)
    if model_type is None or model_type in found.model_types:
        return found
    own = _find_preset(AUTO, model_type, notes)
    if own is not None:
        raise CompileError(
            Fault(
                what="the preset is not for this model",
                where=where,
                got=f"{preset}, which is for model_type {', '.join(found.model_types)}",
                expected=f"the preset for model_type {model_type}",
                next=f"use --preset auto or --preset {own.name}",
            )
        )
    notes.append(f"Preset {preset} was made for model_type {', '.join(found.model_types)}; this model is {model_type}.")
    return found


def _by_alias(
    alias: str, presets: Sequence[SpecFile], model_type: str | None, notes: list[str], where: str
) -> SpecFile:
    """The preset that `alias` means for a model of `model_type`."""
    found = next((preset for preset in presets if model_type in preset.model_types), None)
    names = ", ".join(str(preset.name) for preset in presets)
    if found is None:
        raise CompileError(
            Fault(
                what="the preset is not for this model",
                where=where,
                got=f"{alias}, for model_type {model_type}",
                expected=f"a model that transformers has: {alias} stands for {names}, not for models of remote code",
                next="use --preset auto, or write a spec file: the rows of a fused weight must be known, not guessed",
            )
        )
    note = f"Preset {alias} stands for {names}; this model is a {model_type}, planned by preset {found.name}."
    wrong = found.deepspeed_presets.get(alias)
    notes.append(f"{note} DeepSpeed's own {alias} {wrong}." if wrong else note)
    return found


def _preset_of_deepspeed(preset_model: str, model_type: str | None, notes: list[str]) -> str:
    """The preset that stands for DeepSpeed's `preset_model`: the model's own, wherever there is one."""
    preset_model = preset_model.lower()  # as DeepSpeed does
    own = _find_preset(AUTO, model_type, notes)
    if own is None or own.name is None:
        return preset_model
    wrong = own.deepspeed_presets.get(preset_model)
    if wrong is not None:
        notes.append(
            f"preset_model {preset_model!r} of the DeepSpeed config was replaced by preset {own.name!r}. "
            f"DeepSpeed's own {wrong}."
        )
    elif own.name != preset_model:
        notes.append(
            f"preset_model {preset_model!r} of the DeepSpeed config was replaced by preset {own.name!r}: "
            f"the model is a {model_type}, which differs."
        )
    return own.name
