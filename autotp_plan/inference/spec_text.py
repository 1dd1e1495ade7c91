"""From the regions of two small models to the JSON of a spec file, with expressions of config keys for all sizes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autotp_plan.huggingface import scale_config
from autotp_plan.huggingface.disk_names import ties
from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.inference.expressions import Expressions, Values
from autotp_plan.inference.layers import Region, Split
from autotp_plan.inference.own_architecture import OwnArchitecture
from autotp_plan.inference.small_model import Architecture, SmallModel, numbers_of
from autotp_plan.inference.trial import Run
from autotp_plan.inference.units import Segment
from autotp_plan.schemas.names import is_index, parent_module
from autotp_plan.schemas.templates import Templates, pattern_of

Rule = dict[str, Any]
_MANY_WORDS = 10_000
"""A table of so many rows is one of words, not of positions or types."""


class Unexpressed(Exception):
    """A size for which no expression of config keys was found."""


class SpecText:
    """Collects the parts of a spec file.

    Args:
        architecture: what is described.
        models: small models of it.
    """

    def __init__(self, architecture: Architecture | OwnArchitecture, models: Sequence[SmallModel]) -> None:
        self.architecture, self.models = architecture, models
        given = [key for key, _ in numbers_of(architecture.given)]
        original = architecture.numbers
        aliases = architecture.aliases
        every = [
            {aliases.get(key, key): value for key, value in one.items()}
            for one in (*(one.numbers for one in models), original)
        ]
        self.expressions = Expressions.of(every, given)
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters_and_buffers(architecture.original)}
        classes = {name: type(module).__name__ for name, module in architecture.original.named_modules()}
        self.template = Templates(shapes, classes)
        self.shapes = {self.template(name): shape for name, shape in shapes.items()}
        self.sizes: dict[tuple[str, int], set[int]] = {}
        for name, shape in shapes.items():
            for dim, size in enumerate(shape):
                self.sizes.setdefault((self.template(name), dim), set()).add(size)
        self.symbols: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.rules: dict[str, Rule] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def add(self, same: Sequence[Region]) -> bool:
        """Add one region as it is in each model, or else leave it whole and note why."""
        try:
            rules, modules, attributes = self._region(same)
        except Unexpressed as error:
            self.notes.append(f"{self.template(same[0].module)} stays whole: {error}")
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
        vocabulary = self._vocabulary()
        self._whole({name for rule in vocabulary for name in rule["patterns"]})
        tied = list(self._ties())
        layers = self._num_layers()
        words = {
            "$schema": "autotp_plan/schemas/spec.schema.json",
            "name": "inferred",
            "description": f"{self.architecture.name}: inferred from the model itself."
            + "".join(f" {note}." for note in dict.fromkeys(self.notes)),
            "model_types": self.architecture.model_types,
            "defaults": self.defaults,
            "symbols": self.symbols,
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

    def _region(self, same: Sequence[Region]) -> tuple[dict[str, Rule], dict[str, Any], dict[str, Any]]:
        first = same[0]
        if any(self._outline(other) != self._outline(first) for other in same[1:]):
            raise Unexpressed("its weights are not divided in the same way at all sizes")
        self._name_heads(same)
        rules: dict[str, Rule] = {}
        for parameter in first.splits:
            rules[self.template(parameter)] = self._rule(same, parameter)
        for parameter in first.partial:
            rules[self.template(parameter)] = {"partition_type": "skip", "grad_allreduce": True}
        for parameter in first.added_once:
            rules[self.template(parameter)] = {"partition_type": "skip", "add_once": True}
        modules: dict[str, Any] = {}
        for module, (start, stop, size) in first.copied_outputs.items():
            ends = [tuple(one.copied_outputs[_renamed(module, first, one)][at] for one in same) for at in (0, 1)]
            crossing = "copy" if (start, stop) == (0, size) else {"copy": [self._size(end) for end in ends]}
            modules.setdefault(self.template(module), {})["output"] = crossing
            rules.setdefault(self.template(f"{module}.weight"), {"partition_type": "skip"})
        inputs: dict[str, Any] = dict.fromkeys(first.copied_inputs, "copy")
        for argument, (dim, _) in first.split_inputs.items():
            period = [one.split_inputs[argument][1][0] for one in same]
            entry: dict[str, Any] = {"split": self._size(tuple(part.size for part in period)), "dim": dim}
            unit = self._unit(same, period)
            inputs[argument] = entry | ({"unit": unit} if unit != 1 else {})
        if inputs:
            modules.setdefault(self.template(first.module), {})["inputs"] = inputs
        if first.experts:
            modules.setdefault(self.template(first.module), {})["output"] = "reduce"
        for norm in first.means:
            modules.setdefault(self.template(norm), {})["mean_over_ranks"] = True
        if first.buffers:
            modules.setdefault(self.template(first.module), {})["buffers"] = dict(first.buffers)
        attributes: dict[str, dict[str, str]] = {}
        for path, meaning in first.attributes.items():
            inside, _, name = path.rpartition(":")
            module = f"{first.module}.{inside}" if inside else first.module
            attributes.setdefault(self.template(module), {})[name] = self._count(same, meaning)
        return rules, modules, attributes

    def _outline(self, region: Region) -> Any:
        """What must be the same in models of all sizes."""
        if region.experts and region.num_blocks > 1:  # as many blocks as experts
            return sorted(map(self.template, region.splits)), region.copied_inputs
        splits = {
            self.template(name): (split.dim, [(one.fine, one.shared) for one in split.segments])
            for name, split in region.splits.items()
        }
        whole = [*map(self.template, region.partial)], [*map(self.template, region.copied_outputs)]
        return splits, region.grouped, whole, region.copied_inputs, [*region.split_inputs]

    def _rule(self, same: Sequence[Region], parameter: str) -> Rule:
        first = same[0]
        splits = [one.splits[_renamed(parameter, first, one)] for one in same]
        dims = self.models[0].model.get_parameter(parameter).dim()
        kind = "shard"
        if parameter.rpartition(".")[0] in first.columns:
            kind = "column"
        elif parameter == first.consumer and not first.experts:
            kind = "row"
        parts = list(zip(*(split.segments for split in splits)))
        rule: Rule = {"partition_type": kind}
        at = splits[0].dim
        if len(self.sizes[self.template(parameter), at]) > 1 and dims == 2 and len(parts) == 1:
            return rule | self._by_heads(same, parameter, at, parts[0])
        shape = self._shape(same, splits, dims, parameter)
        if shape is not None:
            rule["shape"], at = shape
        units = [self._unit(same, part) for part in parts]
        if set(units) != {1}:
            rule["unit"] = units[0] if len(set(units)) == 1 else units
        shared = ["replicate" if self._is_shared(first, part[0]) else "error" for part in parts]
        if "replicate" in shared:
            rule["indivisible"] = "replicate" if set(shared) == {"replicate"} else shared
        if at != (1 if kind == "row" else 0):
            rule["partition_dim"] = at
        return rule

    def _by_heads(self, same: Sequence[Region], parameter: str, dim: int, part: Sequence[Segment]) -> Rule:
        """The rule's shape where heads are as many in all layers, and wider in some: heads, and what that leaves."""
        fine, coarse = self._heads(same)
        if part[0].shared or part[0].count == 1:
            raise Unexpressed("its size differs between layers")
        weights = [
            model.model.get_parameter(_renamed(parameter, same[0], one)) for model, one in zip(self.models, same)
        ]
        other = self._size(tuple(weight.shape[1 - dim] for weight in weights))
        shape: list[Any] = [[fine if part[0].fine else coarse], -1]
        rule: Rule = {"shape": [*shape, other] if dim == 0 else [other, *shape]}
        if part[0].fine:
            rule["unit"] = f"{fine} // gcd({fine}, max({coarse}, tp_size))"
        elif self._is_shared(same[0], part[0]):
            rule["indivisible"] = "replicate"
        return rule | ({"partition_dim": dim} if dim == 1 else {})

    def _shape(
        self, same: Sequence[Region], splits: Sequence[Split], dims: int, parameter: str
    ) -> tuple[list[Any], int] | None:
        """The logical shape of a rule and the dimension of it that is sharded; None to leave it out."""
        first, dim = same[0], splits[0].dim
        parts = list(zip(*(split.segments for split in splits)))
        sizes: list[Values] = [tuple(segment.size for segment in part) for part in parts]
        whole = self.shapes[self.template(parameter)][dim]
        real = whole // len(sizes) if len(set(sizes)) == 1 and whole % len(sizes) == 0 else None
        shape: list[Any] = [-1] * dims
        if first.num_blocks > 1 and first.experts:
            number = self._size((*(one.num_blocks for one in same), None))
            block = self._size((*(segment.size for segment in parts[0]), None))
            return [*shape[:dim], number, [block], *shape[dim + 1 :]], dim + 1
        if len(set(sizes)) == 1 and len(sizes) > 3:
            shape[dim] = len(sizes)
            return shape, dim
        try:
            shape[dim] = [self._size((*size, real)) for size in sizes]
        except Unexpressed:
            if len(sizes) > 1 and len(set(sizes)) == 1:
                shape[dim] = len(sizes)
                return shape, dim
            shape[dim] = None
        if shape[dim] is None or self._original(shape[dim]) not in (whole, None):
            try:  # units of which there are so many
                shape[dim] = [self._units_of(same, part) for part in parts]
            except Unexpressed:
                if len(sizes) == 1:
                    return None
                raise
            if self._original(shape[dim]) not in (whole, None):
                if len(parts) == 1 and {segment.unit for segment in parts[0]} == {1}:
                    return None  # features that are rounded up, each of which is a unit
                raise Unexpressed(
                    f"no expressions of config keys make up the {whole} rows of {self.template(parameter)}"
                )
        return shape, dim

    def _original(self, sizes: Sequence[str]) -> int | None:
        """What expressions are together in the original; None where that is not known."""
        values = [self.expressions.value(size)[len(self.models) :] for size in sizes]
        return sum(one[0] for one in values) if all(values) else None

    def _units_of(self, same: Sequence[Region], part: Sequence[Segment]) -> str:
        """The size of a segment as a number of units."""
        if part[0].shared:
            return self._size(tuple(segment.size for segment in part))
        fine, coarse = self._heads(same)
        units = tuple(segment.unit for segment in part)
        return _times(fine if part[0].fine else coarse, self._width(same, units))

    def _width(self, same: Sequence[Region], units: tuple[int, ...]) -> str:
        """The expression of a unit: a size, or widths of other units in the region added up."""
        if set(units) == {1}:
            return "1"
        counted = [one.units for one in same]
        if all(unit == one.size // len(one.coarse) for unit, one in zip(units, counted)) and (
            same[0].grouped and all(1 < one.num_shared < unit for unit, one in zip(units, counted))
        ):  # all the heads of a group
            fine, coarse = self._heads(same)
            width = self._size(tuple(one.size // len(one.fine) for one in counted), "head_dim")
            return f"{width} * ({fine} // {coarse})"
        try:
            return self._size(units, "head_dim")
        except Unexpressed:
            pass
        found: dict[tuple[int, ...], str] = {}
        for parameter in same[0].splits:
            others = [one.splits[_renamed(parameter, same[0], one)].segments for one in same]
            for part in zip(*others):
                other = tuple(segment.unit for segment in part)
                text = self.expressions.find((*other, None))
                if text is not None and not part[0].shared and len(set(other)) > 1:
                    found.setdefault(other, text)
        for (a, x), (b, y) in itertools.combinations(found.items(), 2):
            for i, j in itertools.product(range(1, 5), repeat=2):
                if all(i * p + j * q == unit for p, q, unit in zip(a, b, units)):
                    return " + ".join(_times(str(n), text) if n > 1 else text for n, text in ((i, x), (j, y)))
        numbers = " and ".join(map(str, units))
        raise Unexpressed(f"no expression of config keys is {numbers} in two small models")

    def _unit(self, same: Sequence[Region], part: Sequence[Segment]) -> Any:
        """The unit of a segment: an expression, or 1."""
        units = tuple(segment.unit for segment in part)
        if part[0].fine:
            fine, coarse = self._heads(same)
            joined = f"{fine} // gcd({fine}, max({coarse}, tp_size))"
            return joined if set(units) == {1} else f"{self._size(units, 'head_dim')} * ({joined})"
        if len(set(units)) == 1 and units[0] <= 4:
            return units[0]
        return self._size(units) if part[0].shared else self._width(same, units)

    def _name_heads(self, same: Sequence[Region]) -> None:
        """Find what a head's width is called, so that sizes are written as numbers of heads."""
        first = same[0]
        width: Values = tuple(one.units.size // len(one.units.fine) for one in same)
        if max(one or 0 for one in width) > 1:
            fine, _ = self._heads(same)
            heads = self.expressions.value(fine)[len(same) :]
            whole = self.shapes[self.template(first.consumer)][first.consumer_dim]
            same_in_all = len(self.sizes[self.template(first.consumer), first.consumer_dim]) == 1
            known = heads and whole % heads[0] == 0 and same_in_all
            self._size((*width, whole // heads[0] if known else None), "head_dim")

    def _heads(self, same: Sequence[Region]) -> tuple[str, str]:
        fine = self._size(tuple(len(one.units.fine) for one in same), "num_heads")
        coarse = self._size(tuple(len(one.units.coarse) for one in same), "num_kv_heads")
        return fine, coarse

    def _count(self, same: Sequence[Region], meaning: str) -> str:
        """The expression of an attribute's value on a rank."""
        first = same[0]
        fine, coarse = self._heads(same)
        width = tuple(one.units.size // len(one.units.fine) for one in same)
        share = f"share({fine})" if fine == coarse else f"share({fine}, {coarse})"
        if first.num_blocks > 1:
            number = tuple(one.num_blocks for one in same)
            text = str(number[0]) if len(set(number)) == 1 else self._size(number)
            share = f"{text} * share({fine} // {text})"
            if meaning == "fine // blocks":
                inside = self._size(tuple(len(one.units.fine) // one.num_blocks for one in same))
                return f"share({inside})"
        if meaning.count(" ") == 2 and "*" not in meaning and "/" not in meaning:
            return self._sum_of_segments(same, Run.read(meaning))
        return {
            "fine": share,
            "coarse": f"share({coarse})",
            "fine // coarse": f"{fine} // max({coarse}, tp_size)",
            "fine * width": f"{share} * {self._size(width, 'head_dim') if max(width) > 1 else 1}",
            "coarse * width": f"share({coarse}) * {self._size(width, 'head_dim') if max(width) > 1 else 1}",
        }[meaning]

    def _sum_of_segments(self, same: Sequence[Region], run: Run) -> str:
        """The expression of how many indices of consecutive segments a rank holds."""
        fine, coarse = self._heads(same)
        splits = [one.splits[f"{one.module}.{run.parameter}"] for one in same]
        terms: dict[str, int] = {}
        for part in list(zip(*(split.segments for split in splits)))[run.first : run.last]:
            units = tuple(segment.unit for segment in part)
            unit = "1" if set(units) == {1} else self._size(units) if part[0].shared else self._width(same, units)
            share = f"share({fine}, {coarse})" if part[0].fine and fine != coarse else f"share({coarse})"
            term = unit if part[0].shared else _times(share, unit)
            terms[term] = terms.get(term, 0) + 1
        return " + ".join(term if number == 1 else f"{number} * {term}" for term, number in terms.items())

    def _is_shared(self, region: Region, segment: Segment) -> bool:
        several = len(region.units.coarse) < len(region.units.fine) and not region.grouped
        return segment.shared or (several and not segment.fine)

    def _size(self, values: Values, name: str | None = None) -> str:
        """The expression of a size in each small model, and in the original where that is known."""
        values = values if len(values) > len(self.models) else (*values, None)
        found = self.expressions.find(values)
        if found is None and self.models[0] is self.models[-1]:
            return self._number(values[0] or 0, name)
        if found is None:
            numbers = " and ".join(str(value) for value in values[: len(self.models)])
            raise Unexpressed(f"no expression of config keys is {numbers} in two small models")
        if name is not None and " " in found and name not in self.expressions.names:
            self.symbols[name] = found
            self.expressions.define(name, found)
            return name
        return found

    def _number(self, value: int, name: str | None) -> str:
        """A size of a model that is there in one size alone: the number, under a name where it may have one."""
        if name == "num_kv_heads" and self.symbols.get("num_heads") == value:
            return "num_heads"
        if name is None or self.symbols.setdefault(name, value) != value:
            return str(value)
        return name

    def _vocabulary(self) -> list[Rule]:
        model = self.models[0].model
        rules: list[Rule] = []
        names = {id(module): name for name, module in model.named_modules()}
        embedding, head = self.models[0].embedding_and_head()
        second_names = {tie["name"]: tie["to"] for tie in self._ties()}
        bias = second_names.get(f"{names.get(id(head))}.bias")
        if bias is not None:  # it lies in a module around the head under its first name
            rules.append(
                {
                    "patterns": [pattern_of(bias)],
                    "partition_type": "shard",
                    "shape": [["vocab_size"]],
                    "indivisible": "uneven",
                }
            )
        for module, extra in (
            (embedding, {"partition_type": "vocab"}),
            (head, {"partition_type": "column", "gather_output": True}),
        ):
            if module is None or id(module) not in names or not hasattr(module, "weight"):
                continue
            name = names[id(module)]
            rows = tuple(one.model.get_submodule(name).weight.shape[0] for one in self.models)
            size = "vocab_size" if all(r == one.numbers.get("vocab_size") for r, one in zip(rows, self.models)) else -1
            shape: list[Any] = [[size] if size != -1 else -1, -1]
            tables = [name]
            if module is embedding:  # other modules that look up in the same table
                tables += [
                    other
                    for other, one in model.named_modules()
                    if one is not module and type(one) is type(module) and one.weight is module.weight
                ]
            rule = {
                "patterns": [pattern_of(f"{table}.weight") for table in tables],
                **extra,
                "shape": shape,
                "indivisible": "uneven",
            }
            rules.append(rule)
        rules += self._other_tables(embedding)
        return rules

    def _other_tables(self, embedding: Any) -> Iterator[Rule]:
        """Rules for tables of other features of the same tokens, as large as the embedding."""
        if not hasattr(embedding, "weight"):
            return
        for name, table in self.models[0].model.named_modules():
            if type(table) is not type(embedding) or table.weight is embedding.weight:
                continue
            key = self.template(f"{name}.weight")
            if len(table.weight) == len(embedding.weight) and self.shapes[key][0] >= _MANY_WORDS:
                patterns = [pattern_of(key)]
                yield {"patterns": patterns, "partition_type": "vocab", "shape": [-1, -1], "indivisible": "uneven"}

    def _whole(self, decided: set[str]) -> None:
        """A rule for every parameter that stays whole and that a default does not decide."""
        sharded = {parent_module(name) for name, rule in self.rules.items() if rule["partition_type"] != "skip"}
        sharded |= {name.rpartition(".")[0] for name, rule in self.rules.items() if rule["partition_type"] == "shard"}
        optional = self._optional()
        tied = {tie["name"] for tie in self._ties() if pattern_of(tie["to"]) in decided}
        for key, shape in self.shapes.items():
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
                found.setdefault(self.template(name), set()).add(index)
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
        full = dict(numbers_of(self.models[0].config))
        for key, alias in self.architecture.aliases.items():
            if alias in names:
                self.symbols[alias] = [alias, key]
        for name in sorted(names & full.keys() - given.keys() - self.symbols.keys()):
            if name in self.architecture.computed:
                others = {key: found for key, found in self.expressions.names.items() if key != name}
                values = (*(one.numbers[name] for one in self.models), None)
                other = Expressions(names=others).find(values)
                if other is not None:
                    self.symbols[name] = [name, other]
                    continue
            self.defaults[name] = dict(numbers_of(self.architecture.config)).get(name, full[name])
        for name in sorted(names & given.keys() - self.symbols.keys()):  # another size's config.json may leave it out
            other = self._without(name)
            if other is not None:
                self.symbols[name] = [name, other]

    def _without(self, name: str) -> str | None:
        """The expression of what transformers takes for a key that is not given, where others decide it."""
        configs = [*(one.config for one in self.models), self.architecture.config]
        values = tuple(self.architecture.value_without(config, name) for config in configs)
        if None in values or len(set(values)) == 1:
            return None
        return Expressions(names={k: v for k, v in self.expressions.names.items() if k != name}).find(values)


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


def _times(one: str, other: str) -> str:
    """A product of two expressions."""
    if other == "1":
        return one
    return " * ".join(f"({text})" if " + " in text or " // " in text else text for text in (one, other))


def _renamed(name: str, first: Region, other: Region) -> str:
    """The name in another region of what is called `name` in the first, where layers have other numbers."""
    return name if first.module == other.module else name.replace(first.module, other.module, 1)


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
