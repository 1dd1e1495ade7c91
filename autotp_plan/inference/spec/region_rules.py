"""From a region, as it is in each small model, to the rules of a spec file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotp_plan.inference.regions.layers import Region, Split
from autotp_plan.inference.regions.shares import Run
from autotp_plan.inference.regions.units import Segment
from autotp_plan.inference.spec.expressions import Values
from autotp_plan.inference.spec.numbers import Numbers, Unexpressed, renamed, times

Rule = dict[str, Any]


class RegionRules:
    """Writes the rules of regions.

    Args:
        numbers: how sizes are written.
    """

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def of(self, same: Sequence[Region]) -> tuple[dict[str, Rule], dict[str, Any], dict[str, Any]]:
        """The rules, modules and attributes of a region, by name.

        Args:
            same: the region in each small model.

        Raises:
            Unexpressed: no expression of config keys is a size of it.
        """
        first = same[0]
        if any(self._outline(other) != self._outline(first) for other in same[1:]):
            raise Unexpressed("its weights are not divided in the same way at all sizes")
        self.numbers.name_heads(same)
        rules: dict[str, Rule] = {}
        for parameter in first.splits:
            rules[self.numbers.template(parameter)] = self._rule(same, parameter)
        for parameter in first.partial:
            rules[self.numbers.template(parameter)] = {"partition_type": "skip", "grad_allreduce": True}
        for parameter in first.added_once:
            rules[self.numbers.template(parameter)] = {"partition_type": "skip", "add_once": True}
        modules: dict[str, Any] = {}
        for module, (start, stop, size) in first.copied_outputs.items():
            ends = [tuple(one.copied_outputs[renamed(module, first, one)][at] for one in same) for at in (0, 1)]
            crossing = "copy" if (start, stop) == (0, size) else {"copy": [self.numbers.size(end) for end in ends]}
            modules.setdefault(self.numbers.template(module), {})["output"] = crossing
            rules.setdefault(self.numbers.template(f"{module}.weight"), {"partition_type": "skip"})
        inputs: dict[str, Any] = dict.fromkeys(first.copied_inputs, "copy")
        for argument, (dim, _) in first.split_inputs.items():
            period = [one.split_inputs[argument][1][0] for one in same]
            entry: dict[str, Any] = {"split": self.numbers.size(tuple(part.size for part in period)), "dim": dim}
            unit = self.numbers.unit(same, period)
            inputs[argument] = entry | ({"unit": unit} if unit != 1 else {})
        if inputs:
            modules.setdefault(self.numbers.template(first.module), {})["inputs"] = inputs
        if first.experts:
            modules.setdefault(self.numbers.template(first.module), {})["output"] = "reduce"
        for norm in first.means:
            modules.setdefault(self.numbers.template(norm), {})["mean_over_ranks"] = True
        if first.buffers:
            modules.setdefault(self.numbers.template(first.module), {})["buffers"] = dict(first.buffers)
        attributes: dict[str, dict[str, str]] = {}
        for path, meaning in first.attributes.items():
            inside, _, name = path.rpartition(":")
            module = f"{first.module}.{inside}" if inside else first.module
            attributes.setdefault(self.numbers.template(module), {})[name] = self._count(same, meaning)
        return rules, modules, attributes

    def _outline(self, region: Region) -> Any:
        """What must be the same in models of all sizes."""
        if region.experts and region.num_blocks > 1:  # as many blocks as experts
            return sorted(map(self.numbers.template, region.splits)), region.copied_inputs
        splits = {
            self.numbers.template(name): (split.dim, [(one.fine, one.shared) for one in split.segments])
            for name, split in region.splits.items()
        }
        whole = [*map(self.numbers.template, region.partial)], [*map(self.numbers.template, region.copied_outputs)]
        return splits, region.grouped, whole, region.copied_inputs, [*region.split_inputs]

    def _rule(self, same: Sequence[Region], parameter: str) -> Rule:
        first = same[0]
        splits = [one.splits[renamed(parameter, first, one)] for one in same]
        dims = self.numbers.models[0].model.get_parameter(parameter).dim()
        kind = "shard"
        if parameter.rpartition(".")[0] in first.columns:
            kind = "column"
        elif parameter in (first.consumer, *first.inner) and not first.experts:
            kind = "row"
        parts = list(zip(*(split.segments for split in splits)))
        rule: Rule = {"partition_type": kind}
        at = splits[0].dim
        if len(self.numbers.sizes[self.numbers.template(parameter), at]) > 1 and dims == 2 and len(parts) == 1:
            return rule | self._by_heads(same, parameter, at, parts[0])
        shape = self._shape(same, splits, dims, parameter)
        if shape is not None:
            rule["shape"], at = shape
        units = [self.numbers.unit(same, part) for part in parts]
        if set(units) != {1}:
            rule["unit"] = units[0] if len(set(units)) == 1 else units
        shared = ["replicate" if self.numbers.is_shared(first, part[0]) else "error" for part in parts]
        if "replicate" in shared:
            rule["indivisible"] = "replicate" if set(shared) == {"replicate"} else shared
        if at != (1 if kind == "row" else 0):
            rule["partition_dim"] = at
        return rule

    def _by_heads(self, same: Sequence[Region], parameter: str, dim: int, part: Sequence[Segment]) -> Rule:
        """The rule's shape where heads are as many in all layers, and wider in some: heads, and what that leaves."""
        fine, coarse = self.numbers.heads(same)
        if part[0].shared or part[0].count == 1:
            raise Unexpressed("its size differs between layers")
        weights = [
            model.model.get_parameter(renamed(parameter, same[0], one)) for model, one in zip(self.numbers.models, same)
        ]
        other = self.numbers.size(tuple(weight.shape[1 - dim] for weight in weights))
        shape: list[Any] = [[fine if part[0].fine else coarse], -1]
        rule: Rule = {"shape": [*shape, other] if dim == 0 else [other, *shape]}
        if part[0].fine:
            rule["unit"] = f"{fine} // gcd({fine}, max({coarse}, tp_size))"
        elif self.numbers.is_shared(same[0], part[0]):
            rule["indivisible"] = "replicate"
        return rule | ({"partition_dim": dim} if dim == 1 else {})

    def _shape(
        self, same: Sequence[Region], splits: Sequence[Split], dims: int, parameter: str
    ) -> tuple[list[Any], int] | None:
        """The logical shape of a rule and the dimension of it that is sharded; None to leave it out."""
        first, dim = same[0], splits[0].dim
        parts = list(zip(*(split.segments for split in splits)))
        sizes: list[Values] = [tuple(segment.size for segment in part) for part in parts]
        whole = self.numbers.shapes[self.numbers.template(parameter)][dim]
        real = whole // len(sizes) if len(set(sizes)) == 1 and whole % len(sizes) == 0 else None
        shape: list[Any] = [-1] * dims
        if first.num_blocks > 1 and first.experts:
            number = self.numbers.size((*(one.num_blocks for one in same), None))
            block = self.numbers.size((*(segment.size for segment in parts[0]), None))
            return [*shape[:dim], number, [block], *shape[dim + 1 :]], dim + 1
        if len(set(sizes)) == 1 and len(sizes) > 3:
            shape[dim] = len(sizes)
            return shape, dim
        try:
            shape[dim] = [self.numbers.size((*size, real)) for size in sizes]
        except Unexpressed:
            if len(sizes) > 1 and len(set(sizes)) == 1:
                shape[dim] = len(sizes)
                return shape, dim
            shape[dim] = None
        if shape[dim] is None or self.numbers.original(shape[dim]) not in (whole, None):
            try:  # units of which there are so many
                shape[dim] = [self.numbers.units_of(same, part) for part in parts]
            except Unexpressed:
                if len(sizes) == 1:
                    return None
                raise
            if self.numbers.original(shape[dim]) not in (whole, None):
                if len(parts) == 1 and {segment.unit for segment in parts[0]} == {1}:
                    return None  # features that are rounded up, each of which is a unit
                raise Unexpressed(
                    f"no expressions of config keys make up the {whole} rows of {self.numbers.template(parameter)}"
                )
        return shape, dim

    def _count(self, same: Sequence[Region], meaning: str) -> str:
        """The expression of an attribute's value on a rank."""
        first = same[0]
        fine, coarse = self.numbers.heads(same)
        width = tuple(one.units.size // len(one.units.fine) for one in same)
        share = f"share({fine})" if fine == coarse else f"share({fine}, {coarse})"
        if first.num_blocks > 1:
            number = tuple(one.num_blocks for one in same)
            text = str(number[0]) if len(set(number)) == 1 else self.numbers.size(number)
            share = f"{text} * share({fine} // {text})"
            if meaning == "fine // blocks":
                inside = self.numbers.size(tuple(len(one.units.fine) // one.num_blocks for one in same))
                return f"share({inside})"
        if meaning.count(" ") == 2 and "*" not in meaning and "/" not in meaning:
            return self._sum_of_segments(same, Run.read(meaning))
        return {
            "fine": share,
            "coarse": f"share({coarse})",
            "fine // coarse": f"{fine} // max({coarse}, tp_size)",
            "fine * width": f"{share} * {self.numbers.size(width, 'head_dim') if max(width) > 1 else 1}",
            "coarse * width": f"share({coarse}) * {self.numbers.size(width, 'head_dim') if max(width) > 1 else 1}",
        }[meaning]

    def _sum_of_segments(self, same: Sequence[Region], run: Run) -> str:
        """The expression of how many indices of consecutive segments a rank holds."""
        fine, coarse = self.numbers.heads(same)
        splits = [one.splits[f"{one.module}.{run.parameter}"] for one in same]
        terms: dict[str, int] = {}
        for part in list(zip(*(split.segments for split in splits)))[run.first : run.last]:
            units = tuple(segment.unit for segment in part)
            unit = (
                "1"
                if set(units) == {1}
                else self.numbers.size(units)
                if part[0].shared
                else self.numbers.width(same, units)
            )
            share = f"share({fine}, {coarse})" if part[0].fine and fine != coarse else f"share({coarse})"
            term = unit if part[0].shared else times(share, unit)
            terms[term] = terms.get(term, 0) + 1
        return " + ".join(term if number == 1 else f"{number} * {term}" for term, number in terms.items())
