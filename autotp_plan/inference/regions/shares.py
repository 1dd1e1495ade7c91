"""What one rank holds of a region: which units and indices, and the numbers in a module that change with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from autotp_plan.inference.regions.layers import Region, Split
from autotp_plan.inference.regions.units import Segment, Units
from autotp_plan.schemas import intervals as iv


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank holds of `fine` units, `coarse` of them where they share something."""

    tp_size: int
    rank: int
    blocks: int = 1

    def units(self, segment: Segment, units: Units) -> list[int]:
        """The units of a segment that the rank holds, counted from the segment's first."""
        coarse = len(units.coarse) // self.blocks
        first, last = _of_rank(coarse, self.tp_size, self.rank)
        if not segment.fine:
            return list(range(first, last))
        each = units.num_shared
        if coarse >= self.tp_size:
            return list(range(first * each, last * each))
        start, stop = _of_rank(coarse * each, self.tp_size, self.rank)
        return list(range(start, stop))

    def indices(self, split: Split, units: Units) -> list[int]:
        """The indices of a parameter's dimension that the rank holds."""
        found: list[int] = []
        start = 0
        for segment in split.segments:
            held = [0] if segment.shared else self.units(segment, units)
            found += [start + number * segment.unit + at for number in held for at in range(segment.unit)]
            start += segment.size
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """A number that a module may hold: what it counts, in all and on a rank.

    The meaning is `fine`, `coarse * width`, or, for the size of several segments, a `Run` as text.
    """

    meaning: str
    value: int
    local: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Consecutive segments of a parameter, whose sizes a module adds up: `[x; B; C]` of `[z; x; B; C; dt]`."""

    parameter: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.parameter} {self.first} {self.last}"

    @classmethod
    def read(cls, text: str) -> Run:
        """The run of a meaning. Raises ValueError for one that is no run."""
        parameter, first, last = text.split(" ")
        return cls(parameter=parameter, first=int(first), last=int(last))


def counts(region: Region, share: Share) -> list[Count]:
    """The numbers that change with a rank's share."""
    units, blocks = region.units, share.blocks
    fine, coarse = len(units.fine), len(units.coarse)
    width = units.size // fine
    local_coarse = len(share.units(Segment(unit=1, count=coarse // blocks), units)) * blocks
    local_fine = len(share.units(Segment(unit=1, count=fine // blocks, fine=True), units)) * blocks
    found = [Count(meaning="fine", value=fine, local=local_fine)]
    if width > 1:
        found.append(Count(meaning="fine * width", value=fine * width, local=local_fine * width))
    if coarse != fine:
        found += [
            Count(meaning="coarse", value=coarse, local=local_coarse),
            Count(meaning="fine // coarse", value=fine // coarse, local=local_fine // local_coarse),
            Count(meaning="coarse * width", value=coarse * width, local=local_coarse * width),
        ]
    elif any(s.shared for split in region.splits.values() for s in split.segments):  # shared by all
        found.append(Count(meaning="fine", value=fine, local=local_fine))
    if blocks > 1:
        found.append(Count(meaning="fine // blocks", value=fine // blocks, local=local_fine // blocks))
    elif not region.experts:
        found += _counts_of_runs(region, share)
    return found


def _counts_of_runs(region: Region, share: Share) -> Iterator[Count]:
    """The sizes of segments, and of consecutive ones together."""
    for parameter, split in region.splits.items():
        sizes = [
            (one.size, one.size if one.shared else len(share.units(one, region.units)) * one.unit)
            for one in split.segments
        ]
        for first, last in itertools.combinations(range(len(sizes) + 1), 2):
            value, local = (sum(size[at] for size in sizes[first:last]) for at in (0, 1))
            if value != local:
                leaf = parameter.removeprefix(f"{region.module}.")
                yield Count(meaning=str(Run(parameter=leaf, first=first, last=last)), value=value, local=local)


def _of_rank(count: int, tp_size: int, rank: int) -> tuple[int, int]:
    if count < tp_size:
        return rank * count // tp_size, rank * count // tp_size + 1
    return iv.divide(count, tp_size)[rank]
