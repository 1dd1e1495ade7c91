"""All rules for one model, in order of precedence: spec files, a DeepSpeed config, a preset.

A `RuleList` holds the rules of one origin, a `RuleSet` all lists and the facts about the model that their files bring
along. No rule is applied to anything here; presets are found in `preset_files`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotp_plan.planner.deepspeed.read_config import TensorParallelSection
from autotp_plan.planner.model.model_input import ModelInput
from autotp_plan.planner.model.tensor_names import DiskNames
from autotp_plan.planner.rules.model_class import fit_to_class, is_known_class
from autotp_plan.planner.rules.preset_files import AUTO, find_preset, preset_for_deepspeed
from autotp_plan.planner.rules.symbols import SymbolError, Symbols
from autotp_plan.planner.wrappers.wrapper import TEXT_CONFIG, Wrapper, find_wrapper, flattened
from autotp_plan.schemas.errors import CompileError, Fault
from autotp_plan.schemas.names import BELOW, MAX_NAMES, fold, num_names
from autotp_plan.schemas.plan.rule_ref import Origin, RuleRef, Section
from autotp_plan.schemas.spec import AttributeSpec, ModuleSpec, Size, Spec, SpecFile
from autotp_plan.schemas.untrusted.patterns import BoundedPattern, SlowPatternError

MAX_LAYERS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleList:
    """The rules of one origin. The name of each begins with `origin` and `name`: `preset llama #1`.

    `trusted` rules know the architecture, and others are compared with them, even where they do not decide. A pattern
    that matches nothing is a fault, unless the list `may_match_nothing`.
    """

    origin: Origin
    name: str = ""
    section: Section = Section.LAYERS
    specs: tuple[Spec, ...]
    attributes: tuple[AttributeSpec, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    trusted: bool = False
    decides: bool = True
    may_match_nothing: bool = False

    def ref(self, index: int, section: Section | None = None) -> RuleRef:
        """The rule that is the `index`th (from 1) of the list, or of another section of the same file."""
        return RuleRef(self.origin, self.name, index, self.section if section is None else section)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleSet:
    """Everything that decides: rule lists in order of precedence, and the facts about the model they bring along.

    `user_files` are spec files and the DeepSpeed config. `preset` knows the architecture even where its rules do not
    decide (`use_default_specs` false). Weights that no rule decides are faults; where `rest_stays_whole` they are
    replicated, and where `may_leave_rest` that is allowed when there is no preset and no `tp_plan`. `heads` are names
    of modules that are heads to a DeepSpeed config.
    """

    lists: tuple[RuleList, ...]
    user_files: tuple[SpecFile, ...]
    preset: SpecFile | None
    notes: tuple[str, ...] = ()
    may_fall_back: bool = False
    rest_stays_whole: bool = False
    may_leave_rest: bool = False
    heads: tuple[str, ...] = ()
    wrapper: Wrapper | None = None
    tower: SpecFile | None = None

    def with_fallback(self, rules: SpecFile, origin: Origin) -> RuleSet:
        """These rules, and after them those made from a `tp_plan`, or inferred, in the place of a preset."""
        last = RuleList(
            origin=origin,
            specs=rules.layer_specs,
            attributes=rules.module_attributes,
            modules=rules.modules,
            trusted=True,
        )
        unused = ", ".join(rules.ignored_tensors)
        notes = [f"These tensors of the checkpoint are not used, as in transformers: {unused}."] if unused else []
        lists = (*self.lists, last)
        if rules.vocabulary_specs:
            section = Section.VOCABULARY
            lists += (RuleList(origin=origin, section=section, specs=rules.vocabulary_specs, trusted=True),)
        return dataclasses.replace(self, lists=lists, preset=rules, notes=(*self.notes, *notes))

    def with_wrapped(self, wrapper: Wrapper, preset: SpecFile) -> RuleSet:
        """These rules, and after them a preset that was placed in a wrapper; all else is replicated."""
        around = _around(wrapper) if self.tower is None else _without_biases(_around(wrapper), self.tower)
        lists = (*self.lists, *_lists_of_preset(preset, decides=True, section=None), around)
        note = _note_on_wrapper(wrapper, str(preset.name))
        return dataclasses.replace(self, lists=lists, preset=preset, wrapper=wrapper, notes=(*self.notes, note))

    def with_tower(self, rules: SpecFile) -> RuleSet:
        """These rules, and between the user's and all others those for what is around a language model."""
        tower = RuleList(
            origin=Origin.INFERENCE,
            specs=rules.layer_specs,
            attributes=rules.module_attributes,
            trusted=True,
            may_match_nothing=True,
        )
        users = [one for one in self.lists if not one.trusted]
        others = [_without_biases(one, rules) if self._is_around(one) else one for one in self.lists if one.trusted]
        return dataclasses.replace(self, lists=(*users, tower, *others), tower=rules)

    def is_of_tower(self, name: str) -> bool:
        """Whether a rule for what is around a language model matches a parameter, or the weight that a bias is of."""
        weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
        rules = () if self.tower is None else self.tower.layer_specs
        return any(_matches(pattern, weight) for spec in rules for pattern in spec.patterns)

    def _is_around(self, rules: RuleList) -> bool:
        return self.wrapper is not None and rules.specs == (self.wrapper.whole,)

    def decide(self, name: str) -> bool:
        """Whether a rule of the user's matches the parameter `name`."""
        patterns = [p for rules in self.lists if not rules.trusted for spec in rules.specs for p in spec.patterns]
        return any(_matches(pattern, name) for pattern in patterns)

    def leaving_rest_whole(self) -> RuleSet:
        """These rules, with every weight that none of them decides replicated, as DeepSpeed does."""
        return dataclasses.replace(self, rest_stays_whole=True)

    @property
    def files(self) -> tuple[SpecFile, ...]:
        """The files whose symbols, ties and names hold, in order of precedence."""
        return (*self.user_files, self.preset) if self.preset else self.user_files

    def symbols(self, config: Mapping[str, Any] | None) -> Symbols:
        """What names mean for a model with `config`."""
        filled: dict[str, Any] = {}
        definitions: dict[str, tuple[int | str, ...]] = {}
        for file in reversed(self.files):
            filled.update(file.defaults)
            definitions.update(file.symbols)
        if config is not None:
            flat = self.wrapper.flat_config(config) if self.wrapper else flattened(config)
            filled.update({TEXT_CONFIG: flat, **flat})  # older configs have the language model's keys outside of it
        return Symbols(config=filled, definitions=definitions)

    def num_layers(self, symbols: Symbols) -> int | None:
        """Number of layers; None when no spec file says how to know it.

        Raises:
            CompileError: a spec file says how, and the model's config does not give it.
        """
        size = next((file.num_layers for file in self.files if file.num_layers is not None), None)
        try:
            number = None if size is None else symbols.resolve(size)
            if number is not None and not 1 <= number <= MAX_LAYERS:
                raise SymbolError(f"{number} layers")
        except SymbolError as error:
            raise CompileError(
                Fault(
                    code="unknown-num-layers",
                    what="the number of layers is not known",
                    where="num_layers",
                    got=str(error),
                    expected=f"a size that config.json gives, from 1 to {MAX_LAYERS}",
                    next="correct config.json",
                )
            ) from None
        if number is None and any(
            "*" in name.removesuffix(BELOW) for file in self.files for name in file.ignored_tensors
        ):
            raise CompileError(
                Fault(
                    code="ignored-tensors-without-num-layers",
                    what="ignored_tensors has a * for each layer, and the number of layers is not known",
                    where="ignored_tensors",
                    got=", ".join(
                        n for file in self.files for n in file.ignored_tensors if "*" in n.removesuffix(BELOW)
                    ),
                    expected="num_layers too",
                    next='add "num_layers": "num_hidden_layers", or a number, to the spec file',
                )
            )
        return number

    def disk_names(self, symbols: Symbols, num_layers: int | None) -> DiskNames:
        """How tensors on disk differ from module parameters."""
        layers = f"{{0..{num_layers - 1}}}" if num_layers else "*"
        renamed: dict[str, str] = {}
        assembled: dict[str, tuple[str, ...]] = {}
        for file in reversed(self.files):
            renamed.update(file.renamed_tensors)
            assembled.update(file.assembled_tensors)
        base = next((file.base_model_prefix for file in self.files if file.base_model_prefix), None)
        ignored = {_in_layers(name, layers) for file in self.files for name in file.ignored_tensors}
        for file in self.files:
            ignored |= set(_layers_past_the_last(file, symbols, num_layers))
        if base:  # a checkpoint may lack the prefix, whichever way the names are written here
            ignored |= {name.removeprefix(f"{base}.") for name in ignored}
            ignored |= {f"{base}.{name}" for name in ignored if not name.startswith(f"{base}.")}
        _check_count(ignored)
        return DiskNames(
            renamed=renamed,
            assembled=assembled,
            ignored=tuple(sorted(ignored)),
            base_model_prefix=base,
            renamed_prefixes={
                disk: name for file in reversed(self.files) for disk, name in file.renamed_prefixes.items()
            },
            tied={
                tie.name: tie.to
                for file in reversed(self.files)
                for tie in file.tied
                if tie.when is None or symbols.config_flag(tie.when)
            },
            transposed={
                name: _shape(name, shape, symbols)
                for file in reversed(self.files)
                for name, shape in file.transposed_tensors.items()
            },
        )


def _shape(name: str, shape: Sequence[Size], symbols: Symbols) -> tuple[int, ...]:
    """The shape of a parameter that may be transposed on disk."""
    try:
        return tuple(symbols.resolve(size) for size in shape)
    except SymbolError as error:
        raise CompileError(
            Fault(
                code="unknown-transposed-shape",
                what="the shape of a tensor that may be transposed on disk is not known",
                where=f"transposed_tensors.{name}",
                got=str(error),
                expected="sizes that config.json gives, or -1 for any",
                next="correct the expression, or config.json",
            )
        ) from None


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name; one that is no regular expression is a fault of its own, and matches none."""
    try:
        return _compiled(pattern).match(name)
    except (re.error, OverflowError, RecursionError, SlowPatternError):
        return False


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> BoundedPattern:
    return BoundedPattern(pattern)


def _check_count(ignored: Iterable[str]) -> None:
    """Raise CompileError where patterns of ignored tensors stand for more names than a plan may have."""
    count = sum(num_names(pattern) for pattern in ignored)
    if count > MAX_NAMES:
        raise CompileError(
            Fault(
                code="too-many-ignored-tensors",
                what="the tensors that are ignored are too many",
                where="ignored_tensors",
                got=f"{count} names in all layers",
                expected=f"at most {MAX_NAMES} names",
                next="name what lies below a module by one pattern that ends with .**",
            )
        )


def _in_layers(name: str, layers: str) -> str:
    """The name with `layers` for each `*`; `.**` at its end stays."""
    stem = name.removesuffix(BELOW)
    return stem.replace("*", layers) + name.removeprefix(stem)


def _layers_past_the_last(file: SpecFile, symbols: Symbols, num_layers: int | None) -> Iterator[str]:
    for parent, count in file.ignored_layers.items():
        try:
            extra = symbols.resolve(count)
        except SymbolError as error:
            raise CompileError(
                Fault(
                    code="unknown-ignored-layers",
                    what="the number of layers past the last is not known",
                    where=f"ignored_layers.{parent}",
                    got=str(error),
                    expected="a size that config.json gives, and num_layers too",
                    next="correct the expression, or give the key a default",
                )
            ) from None
        if extra > MAX_LAYERS:
            raise CompileError(
                Fault(
                    code="too-many-ignored-layers",
                    what="there are too many layers past the last",
                    where=f"ignored_layers.{parent}",
                    got=f"{extra} layers",
                    expected=f"at most {MAX_LAYERS}",
                    next="correct the expression, or config.json",
                )
            )
        if extra > 0 and num_layers is not None:
            yield from fold(f"{parent}.{layer}{BELOW}" for layer in range(num_layers, num_layers + extra))


def collect_rules(
    model: ModelInput,
    preset: str,
    spec_files: Sequence[SpecFile],
    section: TensorParallelSection | None,
    strict: bool = False,
) -> RuleSet:
    """The rules for a model.

    Args:
        model: its config says which preset fits, that of the language model in a wrapper; its tensors are looked at
            where it is no causal language model.
        preset: `auto`, `none`, `infer` or a name.
        spec_files: the first has the highest precedence.
        section: the `tensor_parallel` section of a DeepSpeed config; its rules come after the spec files'.
        strict: hold the DeepSpeed config to what a spec file is held to: every weight is decided, every pattern
            matches.

    Raises:
        CompileError: there is no such preset, it is for another model, or for another class than the tensors.
    """
    notes: list[str] = []
    wrapper = find_wrapper(model.config)
    model_type = wrapper.preset_type(model.config or {}) if wrapper else model.model_type
    partition = section.partition_config if section else None
    where = "--preset"
    if section and section.preset_model and preset == AUTO:
        where = "tensor_parallel.preset_model"
        preset = preset_for_deepspeed(section.preset_model, model_type, notes)
    found = find_preset(preset, model_type, notes, where)
    if wrapper and found:
        found = wrapper.place(found)
        notes.append(_note_on_wrapper(wrapper, str(model_type)))
    if found is not None and is_known_class(model.architecture):
        found = fit_to_class(found, model.architecture, model.tensor_names(), notes)
    if found is None:
        wrapper = None
    user_files = (*spec_files, *([partition] if partition else ()))
    use_preset = all(file.use_default_specs for file in user_files)
    lists = [
        _list_of(file, Origin.SPEC, file.name or ("file" if len(spec_files) == 1 else f"file {number}"))
        for number, file in enumerate(spec_files, 1)
    ]
    if partition:
        lists.append(dataclasses.replace(_list_of(partition, Origin.DS_CONFIG), may_match_nothing=not strict))
    if found:
        lists += _lists_of_preset(found, decides=use_preset, section=section)
    if wrapper:
        lists.append(_around(wrapper))
    if section:
        notes.extend(section.notes)
    may_leave_rest = partition is not None and not (spec_files or strict or (section and section.strict_mode))
    may_fall_back = preset == AUTO and found is None and use_preset
    return RuleSet(
        lists=tuple(lists),
        user_files=user_files,
        preset=found,
        notes=tuple(notes),
        may_fall_back=may_fall_back,
        rest_stays_whole=may_leave_rest and not may_fall_back and (found is None or not use_preset),
        may_leave_rest=may_leave_rest,
        heads=section.head_names if section else (),
        wrapper=wrapper,
    )


def _around(wrapper: Wrapper) -> RuleList:
    """The rule of everything outside of a wrapper's language model."""
    return RuleList(origin=Origin.PRESET, name=wrapper.model_type, specs=(wrapper.whole,), trusted=True)


def _without_biases(around: RuleList, tower: SpecFile) -> RuleList:
    """The rule of everything outside of a language model, without the biases of weights that are sharded there."""
    biases = "|".join(
        pattern.removesuffix("weight$") + "bias$"
        for spec in tower.layer_specs
        if spec.partition_type == "column"
        for pattern in spec.patterns
    )
    specs = tuple(dataclasses.replace(one, patterns=(f"(?!{biases}){one.patterns[0]}",)) for one in around.specs)
    return dataclasses.replace(around, specs=specs)


def _note_on_wrapper(wrapper: Wrapper, preset: str) -> str:
    return (
        f"{wrapper.model_type}: its language model, {wrapper.language_model}, is planned by preset {preset}; "
        "all else, as the vision tower and the projector, is replicated on every rank."
    )


def _list_of(file: SpecFile, origin: Origin, name: str = "") -> RuleList:
    return RuleList(
        origin=origin,
        name=name,
        specs=file.layer_specs + file.vocabulary_specs,
        attributes=file.module_attributes,
        modules=file.modules,
    )


def _lists_of_preset(preset: SpecFile, decides: bool, section: TensorParallelSection | None) -> Iterator[RuleList]:
    """A preset's rules, and those of its vocabulary, which decide even where the others do not."""
    name = str(preset.name)
    vocabulary = preset.vocabulary_specs
    if section and section.vocab_parallel_lm_head is False:
        vocabulary = tuple(
            Spec(patterns=spec.patterns, partition_type="skip", optional=spec.optional, when=spec.when)
            for spec in vocabulary
        )
    yield RuleList(
        origin=Origin.PRESET,
        name=name,
        specs=preset.layer_specs,
        attributes=preset.module_attributes,
        modules=preset.modules,
        trusted=True,
        decides=decides,
    )
    yield RuleList(origin=Origin.PRESET, name=name, section=Section.VOCABULARY, specs=vocabulary, trusted=True)
