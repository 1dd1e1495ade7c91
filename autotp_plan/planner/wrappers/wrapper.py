"""The wrappers that are known, and a language model's preset for the place where a wrapper holds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from autotp_plan.schemas.spec import Spec, SpecFile

_MODEL, _HEAD = "model.", "lm_head."
_ANYWHERE = ".*\\."
"""How the patterns of a preset that can be wrapped begin: with one of the two (escaped), or with this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapper:
    """A model around a language model.

    Attributes:
        model_type: the wrapper's, as in config.json.
        language_model: the name in the wrapper of what is `model` in a causal language model.
        head: the name in the wrapper of its `lm_head`.
        text_type: the language model's `model_type` where the config names none.
        renamed_prefixes: as in a spec file.
        ignored: as `ignored_tensors` of a spec file.
        tied: whether the head is tied where the config does not say so.
        tied_by_text: whether the text config's word counts where the wrapper's own is false or missing.
        transposed: as `transposed_tensors` of a spec file; what they name is one tensor on disk.
        symbols: the preset's that mean something else for this wrapper's language model.
    """

    model_type: str
    language_model: str = "model.language_model"
    head: str = "lm_head"
    text_type: str
    renamed_prefixes: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    transposed: dict[str, list[int | str]] = field(default_factory=dict)
    tied: bool = False
    tied_by_text: bool = False
    symbols: dict[str, list[int | str]] = field(default_factory=dict)

    def preset_type(self, config: Mapping[str, Any]) -> str:
        """The `model_type` whose preset plans the language model."""
        named = text_config(config).get("model_type")
        text_type = named if isinstance(named, str) and named != self.model_type else self.text_type
        return preset_of_text(text_type)

    def flat_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's config, as that of a causal language model is written."""
        tied = config.get("tie_word_embeddings")
        if not tied and self.tied_by_text:
            tied = text_config(config).get("tie_word_embeddings")
        return {**flattened(config), "tie_word_embeddings": self.tied if tied is None else bool(tied)}

    def place(self, preset: SpecFile) -> SpecFile | None:
        """The preset's rules and names where this wrapper holds the language model; None for a preset that cannot be.

        Attributes of the wrapper that a causal language model does not have are not known here: everything outside of
        the language model is left to `whole`.
        """
        rules: tuple[Any, ...] = (
            *preset.layer_specs,
            *preset.vocabulary_specs,
            *preset.module_attributes,
            *preset.modules,
        )
        known = (_ANYWHERE, *map(re.escape, _BEGINNINGS))
        if preset.base_model_prefix or not all(p.startswith(known) for rule in rules for p in rule.patterns):
            return None
        return dataclasses.replace(
            preset,
            defaults={**_text_defaults().get(str(preset.name), {}), **preset.defaults},
            symbols={**preset.symbols, **{name: tuple(sizes) for name, sizes in self.symbols.items()}},
            layer_specs=tuple(map(self._placed, preset.layer_specs)),
            vocabulary_specs=tuple(map(self._placed, preset.vocabulary_specs)),
            module_attributes=tuple(map(self._placed, preset.module_attributes)),
            modules=tuple(map(self._placed, preset.modules)),
            tied=tuple(
                dataclasses.replace(tie, name=self._name(tie.name), to=self._name(tie.to)) for tie in preset.tied
            ),
            ignored_tensors=(*map(self._name, preset.ignored_tensors), *self.ignored),
            ignored_layers={self._name(f"{name}.")[:-1]: count for name, count in preset.ignored_layers.items()},
            renamed_tensors={self._name(disk): self._name(name) for disk, name in preset.renamed_tensors.items()},
            assembled_tensors={
                self._name(name): tuple(map(self._name, disks))
                for name, disks in preset.assembled_tensors.items()
                if self._name(name) not in self.transposed
            },
            transposed_tensors={name: tuple(shape) for name, shape in self.transposed.items()},
            renamed_prefixes=self.renamed_prefixes,
        )

    @property
    def whole(self) -> Spec:
        """The rule of everything outside of the language model: vision tower and projector are replicated."""
        language_model, head = (re.escape(f"{name}.") for name in (self.language_model, self.head))
        return Spec(patterns=(f"(?!{language_model}|{head})",), partition_type="skip", optional=True)

    def _placed(self, spec: Any) -> Any:
        return dataclasses.replace(spec, patterns=tuple(map(self._pattern, spec.patterns)))

    def _pattern(self, pattern: str) -> str:
        if pattern.startswith(_ANYWHERE):
            return re.escape(f"{self.language_model}.") + pattern
        name = next(name for name in _BEGINNINGS if pattern.startswith(re.escape(name)))
        return re.escape(self._name(name)) + pattern.removeprefix(re.escape(name))

    def _name(self, name: str) -> str:
        """A name of a causal language model, or its beginning, in the wrapper."""
        if name.startswith(_HEAD):
            return f"{self.head}.{name.removeprefix(_HEAD)}"
        return f"{self.language_model}.{name.removeprefix(_MODEL)}"


_BEGINNINGS = (_MODEL, _HEAD)
TEXT_CONFIG = "text_config"


def find_wrapper(config: Mapping[str, Any] | None) -> Wrapper | None:
    """The wrapper that a config.json is of; None where it is of none that is known."""
    model_type = (config or {}).get("model_type")
    found = _data()["wrappers"].get(model_type) if isinstance(model_type, str) else None
    if found is None:
        return None
    return Wrapper(model_type=str(model_type), **{**found, "ignored": tuple(found.get("ignored", ()))})


def wrapper_types() -> list[str]:
    """The `model_type`s of the wrappers that are known."""
    return sorted(_data()["wrappers"])


def preset_of_text(text_type: str) -> str:
    """The `model_type` whose preset is that of a language model with its own `model_type` inside a wrapper."""
    presets: dict[str, str] = _data()["text_presets"]
    return presets.get(text_type, text_type)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a model's language model, where it is inside another; empty where it is not."""
    text = config.get(TEXT_CONFIG)
    return text if isinstance(text, Mapping) else {}


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the keys of its `text_config` in it, which come before its own."""
    own = {key: value for key, value in config.items() if value is not None}
    return {**config, **text_config(config), **{key: own[key] for key in ("tie_word_embeddings",) if key in own}}


def _text_defaults() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = _data()["text_defaults"]
    return found


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("wrappers.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
