"""One weight as SVG: the pieces in exact integers of indices, scaled to pixels by the browser; marks and labels on top.

Colours are classes (`colours.rules`), so that one picture serves light and dark.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from autotp_plan.planner.pictures.geometry import Drawing, Piece
from autotp_plan.planner.pictures.markup import Markup, tag

TOP, LEFT, BEHIND = 7.0, 7.0, 4.0
"""Pixels around a weight: for brackets over it, for brackets beside it, and for what is stacked behind it."""
_LEAST_GAP, _LEAST_UNIT, _LEAST_LABEL, _MOST_LABELS = 5.0, 3.5, 13.0, 64
_MOST_LANES = 1_000_000


def size(drawing: Drawing) -> tuple[float, float]:
    """Width and height in pixels of the picture of a weight, with what is around it."""
    behind = BEHIND * _copies_behind(drawing)
    top = max(TOP if _has_brackets(drawing) and drawing.across else 1.0, behind + 1)
    left = LEFT if _has_brackets(drawing) and not drawing.across else 1.0
    return left + drawing.width + max(1.0, behind), top + drawing.height + 1.0


def weight_svg(drawing: Drawing, label: str, x: float | None = None, y: float | None = None) -> Markup:
    """The picture of a weight.

    Args:
        drawing: its geometry.
        label: what a screen reader says, and what a pointer shows.
        x: pixels from the left, in an SVG file; not given on a page.
        y: pixels from the top.
    """
    width, height = size(drawing)
    left = LEFT if _has_brackets(drawing) and not drawing.across else 1.0
    top = height - drawing.height - 1.0
    return tag(
        "svg",
        tag("title", label),
        *_stack(drawing, left, top),
        _pieces(drawing, left, top),
        *_marks(drawing, left, top),
        class_="weight",
        role="img",
        x=x,
        y=y,
        width=width,
        height=height,
        viewBox=f"0 0 {width:.5g} {height:.5g}",
    )


def _has_brackets(drawing: Drawing) -> bool:
    return len(drawing.parts) > 2


def _copies_behind(drawing: Drawing) -> int:
    return min(2, drawing.depth - 1)


def _stack(drawing: Drawing, left: float, top: float) -> Iterator[Markup]:
    """The outlines of further matrices, behind the first."""
    for number in range(_copies_behind(drawing), 0, -1):
        away = BEHIND * number
        yield tag("rect", class_="behind", x=left + away, y=top - away, width=drawing.width, height=drawing.height)


def _pieces(drawing: Drawing, left: float, top: float) -> Markup:
    """A path for each colour, in a coordinate system of indices along one side and lanes along the other."""
    thickness = math.lcm(*{piece.lanes for piece in drawing.pieces})
    thickness = min(thickness, _MOST_LANES)
    paths: dict[int | None, list[str]] = defaultdict(list)
    for piece in drawing.pieces:
        first, last = (lane * thickness // piece.lanes for lane in (piece.top, piece.bottom))
        length, deep = piece.stop - piece.start, last - first
        paths[piece.group].append(
            f"M{piece.start} {first}h{length}v{deep}h-{length}z"
            if drawing.across
            else f"M{first} {piece.start}h{deep}v{length}h-{deep}z"
        )
    gaps = " gaps" if min(drawing.pixels_per_index * _mean(drawing), _lane(drawing)) >= _LEAST_GAP else ""
    box = (drawing.length, thickness) if drawing.across else (thickness, drawing.length)
    return tag(
        "svg",
        *(
            tag("path", class_=("all" if group is None else f"r{group}") + gaps, d="".join(d))
            for group, d in sorted(paths.items(), key=lambda item: -1 if item[0] is None else item[0])
        ),
        class_="pieces",
        x=left,
        y=top,
        width=drawing.width,
        height=drawing.height,
        viewBox=f"0 0 {box[0]} {box[1]}",
        preserveAspectRatio="none",
    )


def _mean(drawing: Drawing) -> float:
    """The mean length of a piece, in indices."""
    return sum(piece.stop - piece.start for piece in drawing.pieces) / max(1, len(drawing.pieces))


def _lane(drawing: Drawing) -> float:
    """Pixels of the thickness of a lane."""
    side = drawing.height if drawing.across else drawing.width
    return side / max(piece.lanes for piece in drawing.pieces)


def _marks(drawing: Drawing, left: float, top: float) -> Iterator[Markup]:
    scale = drawing.pixels_per_index
    for piece in drawing.pieces:
        if piece.group is None:  # in pixels: a hatching is not stretched
            place, length = piece.start * scale, (piece.stop - piece.start) * scale
            yield _rect(drawing, left, top, place, length)
    if drawing.units > 1 and drawing.units * scale >= _LEAST_UNIT and not drawing.is_shared:
        lines = [_line(drawing, left, top, at * scale) for at in range(drawing.units, drawing.length, drawing.units)]
        yield tag("path", class_="units", d="".join(lines))
    if _has_brackets(drawing):
        ends = [edge * scale for edge in drawing.parts]
        yield tag("path", class_="seams", d="".join(_line(drawing, left, top, end) for end in ends[1:-1]))
        yield tag(
            "path", class_="brackets", d="".join(_bracket(drawing, left, top, a, b) for a, b in zip(ends, ends[1:]))
        )
    yield from _labels(drawing, left, top, scale)


def _rect(drawing: Drawing, left: float, top: float, place: float, length: float) -> Markup:
    if drawing.across:
        return tag("rect", class_="hatch", x=left + place, y=top, width=length, height=drawing.height)
    return tag("rect", class_="hatch", x=left, y=top + place, width=drawing.width, height=length)


def _line(drawing: Drawing, left: float, top: float, place: float) -> str:
    if drawing.across:
        return f"M{left + place:.5g} {top:.5g}v{drawing.height:.5g}"
    return f"M{left:.5g} {top + place:.5g}h{drawing.width:.5g}"


def _bracket(drawing: Drawing, left: float, top: float, start: float, stop: float) -> str:
    length = max(0.5, stop - start - 2)
    if drawing.across:
        return f"M{left + start + 1:.5g} {top - 2:.5g}v-3h{length:.5g}v3"
    return f"M{left - 2:.5g} {top + start + 1:.5g}h-3v{length:.5g}h3"


def _labels(drawing: Drawing, left: float, top: float, scale: float) -> Iterator[Markup]:
    """The number of the rank in each piece that has room for it."""
    if len(drawing.pieces) > _MOST_LABELS:
        return
    for piece in drawing.pieces:
        if piece.group is None:
            continue
        x, y, width, height = _box(drawing, piece, scale)
        if width >= _LEAST_LABEL and height >= _LEAST_LABEL:
            yield tag(
                "text",
                str(piece.group),
                class_=f"rank t{piece.group}",
                x=round(left + x + width / 2, 1),
                y=round(top + y + height / 2 + 3.6, 1),
            )


def _box(drawing: Drawing, piece: Piece, scale: float) -> tuple[float, float, float, float]:
    place, length = piece.start * scale, (piece.stop - piece.start) * scale
    side = drawing.height if drawing.across else drawing.width
    lane, deep = side * piece.top / piece.lanes, side * (piece.bottom - piece.top) / piece.lanes
    return (place, lane, length, deep) if drawing.across else (lane, place, deep, length)
