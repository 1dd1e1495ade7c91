"""From dependences to units: which indices of weights belong together, and how they lie along a dimension.

Pure functions on integers. A dependence is a bit mask: bit j is set where the consumer's input feature j depends on an
index. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

ALL, NONE = -1, -2
"""Labels of an index on which every feature depends, and of one on which none does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """The units of a consumer's input features.

    Attributes:
        size: number of features.
        coarse: masks of features that belong together, in order of their first feature.
        fine: masks of features that would belong together if what several of them share (key-value heads) were held by
            each; the same as `coarse` where nothing is shared.
    """

    size: int
    coarse: tuple[int, ...]
    fine: tuple[int, ...]

    @property
    def num_shared(self) -> int:
        """How many fine units share what a coarse one holds."""
        return len(self.fine) // len(self.coarse)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Consecutive indices that hold units `first` to `first + count - 1` in order, `unit` indices of each.

    Of a shared segment, which every unit needs, `count` is 1. `fine` says which units are counted; `mixed`, that
    fine and coarse ones are interleaved, so that what is shared cannot be held by several ranks.
    """

    unit: int
    first: int = 0
    count: int = 1
    fine: bool = False
    shared: bool = False
    mixed: bool = False

    @property
    def size(self) -> int:
        return self.unit * self.count


def find_units(size: int, sources: Mapping[str, Sequence[int]]) -> Units | None:
    """The units of a consumer with `size` input features.

    Args:
        size: number of features.
        sources: for each weight dimension, the mask of each index. Indices on which all features depend connect
            nothing.

    Returns:
        None where there are fewer than two units, or units of unequal size.
    """
    everything = (1 << size) - 1
    masks = [mask for one in sources.values() for mask in one if mask not in (0, everything)]
    coarse = components(size, masks)
    fine = min(_finer(size, len(coarse), sources), key=len, default=coarse)
    if len(coarse) == 1:  # what is shared is shared by all
        coarse = fine
    touched = 0
    for mask in masks:
        touched |= mask
    if len(coarse) < 2 or touched != everything or len({mask.bit_count() for mask in coarse}) > 1:
        return None
    return Units(size=size, coarse=tuple(coarse), fine=tuple(fine))


def _finer(size: int, number: int, sources: Mapping[str, Sequence[int]]) -> Iterator[list[int]]:
    """Partitions into more than `number` runs of features, by indices that reach equally many features.

    Query heads are such runs, where key-value heads join several of them.
    """
    for one in sources.values():
        for count in {mask.bit_count() for mask in one} - {0, 1, size}:
            found = components(size, [mask for mask in one if mask.bit_count() == count])
            if (
                len(found) > number
                and len(found) % number == 0
                and all(_is_run(mask) and mask.bit_count() == count for mask in found)
            ):
                yield found


def components(size: int, masks: Sequence[int]) -> list[int]:
    """The classes of features that masks connect, each a mask, in order of the first feature."""
    found: list[int] = [1 << feature for feature in range(size)]
    for mask in sorted(set(masks), key=lambda one: -one.bit_count()):
        joined, rest = mask, []
        for unit in found:
            if unit & mask:
                joined |= unit
            else:
                rest.append(unit)
        found = [*rest, joined]
    return sorted(found, key=lambda unit: unit & -unit)


def labels_of(masks: Sequence[int], size: int, units: Sequence[int]) -> list[int] | None:
    """The unit of each index; None where an index belongs to several, but not to all."""
    everything = (1 << size) - 1
    found = []
    for mask in masks:
        if mask in (0, everything):
            found.append(NONE if mask == 0 else ALL)
            continue
        unit = next((number for number, one in enumerate(units) if one & mask == mask), None)
        if unit is None and not all(one & mask for one in units):
            return None
        found.append(ALL if unit is None else unit)
    return found


def segments(masks: Sequence[int], units: Units) -> tuple[Segment, ...] | None:
    """How a dimension's indices are made of units: `[Q; K; V]` is three segments, interleaved heads are one.

    Args:
        masks: of each index of the dimension.
        units: the consumer's.

    Returns:
        None where the indices do not lie in any order that a layout can express.
    """
    coarse = labels_of(masks, units.size, units.coarse)
    if coarse is None or NONE in coarse:
        return None
    by_coarse = _runs(coarse, fine=False)
    if units.fine == units.coarse:
        return by_coarse
    fine: list[Segment] = []
    start = 0
    for stop in range(1, len(masks) + 1):
        if stop == len(masks) or _is_fine(masks[stop], units) != _is_fine(masks[start], units):
            part = masks[start:stop]
            level = _is_fine(masks[start], units)
            labels = labels_of(part, units.size, units.fine if level else units.coarse)
            found = None if labels is None else _runs(labels, fine=level)
            if found is None:
                return _mixed(by_coarse)
            fine += found
            start = stop
    if by_coarse is None or len(fine) <= len(by_coarse):
        return tuple(fine)
    return _mixed(by_coarse)


def _mixed(found: tuple[Segment, ...] | None) -> tuple[Segment, ...] | None:
    return None if found is None else tuple(replace(segment, mixed=not segment.shared) for segment in found)


def blocks(found: Sequence[Segment], num_units: int) -> int:
    """Into how many blocks of consecutive units weights are divided whose segments do not hold all units each."""
    counts = {segment.count for segment in found if not segment.shared}
    smallest = min(counts, default=num_units)
    if any(count % smallest or segment.first % smallest for count in counts for segment in found) or (
        num_units % smallest
    ):
        return 0
    return num_units // smallest


def divided(segment: Segment, count: int) -> tuple[Segment, ...]:
    """A segment as several, of `count` units each."""
    if segment.shared or segment.count == count:
        return (segment,)
    return tuple(
        Segment(unit=segment.unit, first=segment.first + start, count=count, fine=segment.fine)
        for start in range(0, segment.count, count)
    )


def _is_fine(mask: int, units: Units) -> bool:
    return any(one & mask == mask for one in units.fine)


def _is_run(mask: int) -> bool:
    lowest = mask & -mask
    return (mask // lowest) & (mask // lowest + 1) == 0


def _runs(labels: Sequence[int], fine: bool) -> tuple[Segment, ...] | None:
    """The segments of a sequence of labels; None where runs of one segment differ in length."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and runs[-1][0] == label:
            runs[-1][1] += 1
        else:
            runs.append([label, 1])
    found: list[Segment] = []
    at = 0
    while at < len(runs):
        label, length = runs[at]
        if label == ALL:
            found.append(Segment(unit=length, shared=True))
            at += 1
            continue
        count = 1
        while at + count < len(runs) and runs[at + count] == [label + count, length]:
            count += 1
        found.append(Segment(unit=length, first=label, count=count, fine=fine))
        at += count
    return tuple(found)
