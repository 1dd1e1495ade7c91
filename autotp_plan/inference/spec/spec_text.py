"""The JSON of a spec file: rules of regions and of the vocabulary, what stays whole, and keys that may be left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autotp_plan.huggingface import scale_config
from autotp_plan.huggingface.disk_names import ties
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.inference.regions.layers import Region
from autotp_plan.inference.small.own_architecture import OwnArchitecture
from autotp_plan.inference.small.resized import numbers_of
from autotp_plan.inference.small.small_model import Architecture, SmallModel
from autotp_plan.inference.spec.expressions import Expressions
from autotp_plan.inference.spec.numbers import Numbers, Unexpressed
from autotp_plan.inference.spec.region_rules import RegionRules, Rule
from autotp_plan.inference.spec.vocabulary import vocabulary_rules
from autotp_plan.schemas.names import is_index, parent_module
from autotp_plan.schemas.templates import pattern_of


class SpecText:
    """Collects the parts of a spec file.

    Args:
        architecture: what is described.
        models: small models of it.
    """

    def __init__(self, architecture: Architecture | OwnArchitecture, models: Sequence[SmallModel]) -> None:
        self.architecture = architecture
        self.numbers = Numbers(architecture, models)
        self.region_rules = RegionRules(self.numbers)
        self.defaults: dict[str, Any] = {}
        self.rules: dict[str, Rule] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def add(self, same: Sequence[Region]) -> bool:
        """Add one region as it is in each model, or else leave it whole and note why."""
        try:
            rules, modules, attributes = self.region_rules.of(same)
        except Unexpressed as error:
            self.notes.append(f"{self.numbers.template(same[0].module)} stays whole: {error}")
            return False
        self.rules |= rules
        for name, entry in modules.items():
            self.modules.setdefault(name, {}).update(entry)
        self.attributes |= attributes
        return True

    def document(
        self,
        renamed: Mapping[str, str],
        assembled: Mapping[str, tuple[str, ...]],
        transposed: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Any]:
        """The spec file.

        Args:
            renamed: `renamed_tensors`.
            assembled: `assembled_tensors`.
            transposed: `transposed_tensors`.
        """
        tied = list(self._ties())
        second_names = {tie["name"]: tie["to"] for tie in tied}
        vocabulary = vocabulary_rules(self.numbers.models, self.numbers, second_names)
        self._whole({name for rule in vocabulary for name in rule["patterns"]})
        layers = self._num_layers()
        words = {
            "$schema": "autotp_plan/schemas/spec.schema.json",
            "name": "inferred",
            "description": f"{self.architecture.name}: inferred from the model itself."
            + "".join(f" {note}." for note in dict.fromkeys(self.notes)),
            "model_types": self.architecture.model_types,
            "defaults": self.defaults,
            "symbols": self.numbers.symbols,
            "num_layers": layers,
            "layer_specs": _merged(self.rules),
            "vocabulary_specs": vocabulary,
            "tied": tied,
            "module_attributes": _merged_attributes(self.attributes),
            "modules": _merged(self.modules),
            "renamed_tensors": dict(renamed),
            "assembled_tensors": {name: list(names) for name, names in assembled.items()},
            "transposed_tensors": {name: list(shape) for name, shape in transposed.items()},
        }
        self._complete(words)
        return {key: value for key, value in words.items() if value or key in ("layer_specs", "description")}

    def _whole(self, decided: set[str]) -> None:
        """A rule for every parameter that stays whole and that a default does not decide."""
        sharded = {parent_module(name) for name, rule in self.rules.items() if rule["partition_type"] != "skip"}
        sharded |= {name.rpartition(".")[0] for name, rule in self.rules.items() if rule["partition_type"] == "shard"}
        optional = self._optional()
        tied = {tie["name"] for tie in self._ties() if pattern_of(tie["to"]) in decided}
        for key, shape in self.numbers.shapes.items():
            if key in self.rules or pattern_of(key) in decided or key in tied:
                continue
            weight = f"{key.rpartition('.')[0]}.weight"
            follows = key.endswith(".bias") and len(shape) == 1 and weight in self.rules
            if follows and key in optional and self.rules[weight]["partition_type"] == "column":
                self.rules[key] = {"partition_type": "column"}
            elif (key in optional or not follows) and (
                key in optional or len(shape) >= 2 or {parent_module(key), key.rpartition(".")[0]} & sharded
            ):
                self.rules[key] = {"partition_type": "skip"}
        for key in self.rules:
            if key in optional:
                self.rules[key]["optional"] = True

    def _optional(self) -> set[str]:
        """The parameters that not every layer has."""
        found: dict[str, set[int]] = {}
        for name, _ in parameters_and_buffers(self.architecture.original):
            index = next((int(part) for part in name.split(".") if is_index(part)), None)
            if index is not None:
                found.setdefault(self.numbers.template(name), set()).add(index)
        most = max((len(layers) for layers in found.values()), default=0)
        return {name for name, layers in found.items() if len(layers) < most}

    def _ties(self) -> Iterator[dict[str, str]]:
        for tie in ties(self.architecture.original):
            yield {"name": tie.name, "to": tie.to}

    def _num_layers(self) -> str | None:
        """The key that says how many layers there are, where all that is numbered is one of them."""
        depth = scale_config.num_layers(self.architecture.config)
        names = [name for name, _ in parameters_and_buffers(self.architecture.original)]
        firsts = [next((int(part) for part in name.split(".") if is_index(part)), 0) for name in names]
        if self.architecture.layers is None or depth is None or max(firsts) >= depth:
            return None
        return next((key for key in scale_config.LAYERS if key in self.architecture.config), None)

    def _complete(self, words: Mapping[str, Any]) -> None:
        """Values of the keys that expressions name and that config.json may leave out."""
        given = dict(numbers_of(self.architecture.given))
        names = {name for text in _texts(words) for name in re.findall(r"[A-Za-z_][\w.]*", text)}
        full = dict(numbers_of(self.numbers.models[0].config))
        for key, alias in self.architecture.aliases.items():
            if alias in names:
                self.numbers.symbols[alias] = [alias, key]
        for name in sorted(names & full.keys() - given.keys() - self.numbers.symbols.keys()):
            if name in self.architecture.computed:
                others = {key: found for key, found in self.numbers.expressions.names.items() if key != name}
                values = (*(one.numbers[name] for one in self.numbers.models), None)
                other = Expressions(names=others).find(values)
                if other is not None:
                    self.numbers.symbols[name] = [name, other]
                    continue
            self.defaults[name] = dict(numbers_of(self.architecture.config)).get(name, full[name])
        for name in sorted(
            names & given.keys() - self.numbers.symbols.keys()
        ):  # another size's config.json may leave it out
            other = self._without(name)
            if other is not None:
                self.numbers.symbols[name] = [name, other]

    def _without(self, name: str) -> str | None:
        """The expression of what transformers takes for a key that is not given, where others decide it."""
        configs = [*(one.config for one in self.numbers.models), self.architecture.config]
        values = tuple(self.architecture.value_without(config, name) for config in configs)
        if None in values or len(set(values)) == 1:
            return None
        return Expressions(names={k: v for k, v in self.numbers.expressions.names.items() if k != name}).find(values)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("patterns", "description", "renamed_tensors", "assembled_tensors", "tied"):
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _merged(entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A list of entries with patterns, the same ones joined."""
    found: list[dict[str, Any]] = []
    for name, entry in entries.items():
        same = next((one for one in found if {k: v for k, v in one.items() if k != "patterns"} == entry), None)
        if same is not None:
            same["patterns"].append(pattern_of(name))
        else:
            found.append({"patterns": [pattern_of(name)], **entry})
    return found


def _merged_attributes(entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return _merged({name: {"attributes": found} for name, found in entries.items()})
