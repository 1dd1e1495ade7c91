"""Reads the parts of ranks back from a picture: their areas as exact fractions, and their places."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from fractions import Fraction
from typing import NamedTuple
from xml.etree import ElementTree

from autotp_plan.planner.pictures.colours import group_of
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout

_RECTANGLE = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z")


class Part(NamedTuple):
    """A rectangle of a colour, `r0` and the like or `all`, in units of a weight of `width` x `height`."""

    colour: str
    x: int
    y: int
    wide: int
    high: int
    width: int
    height: int


def drawn_parts(svg: str) -> list[Part]:
    """Every rectangle in the picture of a weight; none lies over another."""
    root = ElementTree.fromstring(svg)
    (pieces,) = (one for one in root.iter() if one.tag.endswith("svg") and one.get("class") == "pieces")
    *_, width, height = map(int, pieces.attrib["viewBox"].split())
    found: list[Part] = []
    for path in pieces:
        colour = path.attrib["class"].split()[0]
        for rectangle in re.split("(?<=z)(?=M)", path.attrib["d"]):
            match = _RECTANGLE.fullmatch(rectangle)
            assert match, f"no rectangle: {rectangle}"
            x, y, wide, high, back = map(int, match.groups())
            assert wide == back and x + wide <= width and y + high <= height, "a piece outside of its weight"
            found.append(Part(colour, x, y, wide, high, width, height))
    return found


def drawn_areas(svg: str) -> dict[str, Fraction]:
    """The share of a weight's area that each colour has."""
    areas: dict[str, Fraction] = defaultdict(Fraction)
    for part in drawn_parts(svg):
        areas[part.colour] += Fraction(part.wide * part.high, part.width * part.height)
    return dict(areas)


def segments(layout: Layout) -> list[tuple[iv.Interval, list[int]]]:
    """Between every two edges of intervals: the ranks that hold what is there, each asked by itself."""
    edges = sorted({edge for held in layout.intervals for interval in held for edge in interval})
    return [
        (
            (start, stop),
            [rank for rank, held in enumerate(layout.intervals) if any(a <= start and stop <= b for a, b in held)],
        )
        for start, stop in zip(edges, edges[1:])
    ]


def expected_areas(layout: Layout, tp_size: int) -> dict[str, Fraction]:
    """The same from the layout: the area of what several ranks hold is shared between them."""
    if layout.dim is None:
        return {"all": Fraction(1)}
    areas: dict[str, Fraction] = defaultdict(Fraction)
    for (start, stop), ranks in segments(layout):
        share = Fraction(stop - start, layout.shape[layout.dim])
        for rank in ranks:
            colour = "all" if len(ranks) == tp_size > 1 else f"r{group_of(rank, tp_size)}"
            areas[colour] += share / len(ranks)
    return dict(areas)


def drawn_indices(svg: str, across: bool) -> dict[str, iv.Intervals]:
    """The indices along the sharded side at which each colour is seen."""
    found: dict[str, set[iv.Interval]] = defaultdict(set)
    for part in drawn_parts(svg):
        found[part.colour].add((part.x, part.x + part.wide) if across else (part.y, part.y + part.high))
    return {colour: iv.join_touching(sorted(places)) for colour, places in found.items()}


def expected_indices(layout: Layout, tp_size: int, length: int) -> dict[str, iv.Intervals]:
    """The same from the layout, over a side of `length` indices that repeats its dimension: one of its views."""
    if layout.dim is None:
        return {"all": ((0, 1),)}
    size = layout.shape[layout.dim]
    found: dict[str, list[iv.Interval]] = defaultdict(list)
    for number in range(length // size):
        for (start, stop), ranks in segments(layout):
            for rank in ranks:
                colour = "all" if len(ranks) == tp_size > 1 else f"r{group_of(rank, tp_size)}"
                found[colour].append((number * size + start, number * size + stop))
    return {colour: iv.join_touching(sorted(set(places))) for colour, places in found.items()}


def assert_drawn(svg: str, layout: Layout, tp_size: int, across: bool) -> None:
    """Each rank's part has the area and the place that the layout gives it, and together they fill the weight once."""
    parts = drawn_parts(svg)
    areas = drawn_areas(svg)
    assert areas == expected_areas(layout, tp_size)
    assert math.isclose(sum(areas.values()), 1, rel_tol=0, abs_tol=0)
    length = parts[0].width if across else parts[0].height
    assert drawn_indices(svg, across) == expected_indices(layout, tp_size, length)
