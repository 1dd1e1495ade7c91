"""How a number of a small model is written in a spec file: as an expression of config keys that holds for all sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from autotp_plan.huggingface.meta_model import parameters_and_buffers
from autotp_plan.inference.regions.layers import Region
from autotp_plan.inference.regions.units import Segment
from autotp_plan.inference.small.own_architecture import OwnArchitecture
from autotp_plan.inference.small.resized import numbers_of
from autotp_plan.inference.small.small_model import Architecture, SmallModel
from autotp_plan.inference.spec.expressions import Expressions, Values
from autotp_plan.schemas.templates import Templates


class Unexpressed(Exception):
    """A size for which no expression of config keys was found."""


class Numbers:
    """The sizes of an architecture as expressions of config keys.

    Args:
        architecture: what is described.
        models: small models of it.

    Attributes:
        template: names of parameters and modules without the numbers of layers.
        shapes: of the original's parameters, by template.
        sizes: of each dimension of them, in all layers.
        symbols: names that were given to expressions.
    """

    def __init__(self, architecture: Architecture | OwnArchitecture, models: Sequence[SmallModel]) -> None:
        self.models = models
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

    def size(self, values: Values, name: str | None = None) -> str:
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

    def heads(self, same: Sequence[Region]) -> tuple[str, str]:
        fine = self.size(tuple(len(one.units.fine) for one in same), "num_heads")
        coarse = self.size(tuple(len(one.units.coarse) for one in same), "num_kv_heads")
        return fine, coarse

    def name_heads(self, same: Sequence[Region]) -> None:
        """Find what a head's width is called, so that sizes are written as numbers of heads."""
        first = same[0]
        width: Values = tuple(one.units.size // len(one.units.fine) for one in same)
        if max(one or 0 for one in width) > 1:
            fine, _ = self.heads(same)
            heads = self.expressions.value(fine)[len(same) :]
            whole = self.shapes[self.template(first.consumer)][first.consumer_dim]
            same_in_all = len(self.sizes[self.template(first.consumer), first.consumer_dim]) == 1
            known = heads and whole % heads[0] == 0 and same_in_all
            self.size((*width, whole // heads[0] if known else None), "head_dim")

    def unit(self, same: Sequence[Region], part: Sequence[Segment]) -> Any:
        """The unit of a segment: an expression, or 1."""
        units = tuple(segment.unit for segment in part)
        if part[0].fine:
            fine, coarse = self.heads(same)
            joined = f"{fine} // gcd({fine}, max({coarse}, tp_size))"
            return joined if set(units) == {1} else f"{self.size(units, 'head_dim')} * ({joined})"
        if len(set(units)) == 1 and units[0] <= 4:
            return units[0]
        return self.size(units) if part[0].shared else self.width(same, units)

    def width(self, same: Sequence[Region], units: tuple[int, ...]) -> str:
        """The expression of a unit: a size, or widths of other units in the region added up."""
        if set(units) == {1}:
            return "1"
        counted = [one.units for one in same]
        if all(unit == one.size // len(one.coarse) for unit, one in zip(units, counted)) and (
            same[0].grouped and all(1 < one.num_shared < unit for unit, one in zip(units, counted))
        ):  # all the heads of a group
            fine, coarse = self.heads(same)
            width = self.size(tuple(one.size // len(one.fine) for one in counted), "head_dim")
            return f"{width} * ({fine} // {coarse})"
        try:
            return self.size(units, "head_dim")
        except Unexpressed:
            pass
        found: dict[tuple[int, ...], str] = {}
        for parameter in same[0].splits:
            others = [one.splits[renamed(parameter, same[0], one)].segments for one in same]
            for part in zip(*others):
                other = tuple(segment.unit for segment in part)
                text = self.expressions.find((*other, None))
                if text is not None and not part[0].shared and len(set(other)) > 1:
                    found.setdefault(other, text)
        for (a, x), (b, y) in itertools.combinations(found.items(), 2):
            for i, j in itertools.product(range(1, 5), repeat=2):
                if all(i * p + j * q == unit for p, q, unit in zip(a, b, units)):
                    return " + ".join(times(str(n), text) if n > 1 else text for n, text in ((i, x), (j, y)))
        numbers = " and ".join(map(str, units))
        raise Unexpressed(f"no expression of config keys is {numbers} in two small models")

    def units_of(self, same: Sequence[Region], part: Sequence[Segment]) -> str:
        """The size of a segment as a number of units."""
        if part[0].shared:
            return self.size(tuple(segment.size for segment in part))
        fine, coarse = self.heads(same)
        units = tuple(segment.unit for segment in part)
        return times(fine if part[0].fine else coarse, self.width(same, units))

    def original(self, sizes: Sequence[str]) -> int | None:
        """What expressions are together in the original; None where that is not known."""
        values = [self.expressions.value(size)[len(self.models) :] for size in sizes]
        return sum(one[0] for one in values) if all(values) else None

    def is_shared(self, region: Region, segment: Segment) -> bool:
        several = len(region.units.coarse) < len(region.units.fine) and not region.grouped
        return segment.shared or (several and not segment.fine)


def times(one: str, other: str) -> str:
    """A product of two expressions."""
    if other == "1":
        return one
    return " * ".join(f"({text})" if " + " in text or " // " in text else text for text in (one, other))


def renamed(name: str, first: Region, other: Region) -> str:
    """The name in another region of what is called `name` in the first, where layers have other numbers."""
    return name if first.module == other.module else name.replace(first.module, other.module, 1)
