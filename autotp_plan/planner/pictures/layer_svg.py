"""One layer as an SVG file, for a README: the same weights as on the page, placed by estimated widths of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autotp_plan.planner.pictures import words
from autotp_plan.planner.pictures.colours import num_groups, rules
from autotp_plan.planner.pictures.facts import Block, Collective, Picture, Section, Stage, Weight, picture
from autotp_plan.planner.pictures.markup import Markup, data_text, plain, tag
from autotp_plan.planner.pictures.model_part import STYLES, describe, label, title
from autotp_plan.planner.pictures.weight_svg import size, weight_svg
from autotp_plan.planner.plan_table import human_bytes
from autotp_plan.schemas.plan.document import Plan

WIDTH, MARGIN = 860.0, 28.0
_GAP, _STAGE_GAP, _LINE = 24.0, 46.0, 16.0
_SANS, _MONO, _TITLE = 6.7, 7.4, 9.6
"""Pixels of a character of 12 pixels, and of the title's; rather too many."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Markup with the height in pixels that it takes, from the y that it was placed at, and its right edge."""

    parts: tuple[Markup, ...]
    height: float
    right: float


def layer_svg(plan: Plan) -> str:
    """The picture of one layer: of the kind that holds most of the model.

    Returns:
        an SVG file, in colours for light and dark.
    """
    drawn = picture(plan)
    section = _largest(drawn)
    name = plain(plan.model.architecture or plan.model.model_type or "a model without a config", 60)
    heading = f"{title(section)} of {name} at TP={plan.tp_size}"
    y = MARGIN + 14
    parts = [_text(MARGIN, y, heading, "title")]
    parts += _keys(plan.tp_size, y + 26)
    y += 52
    start = y
    body: list[Markup] = []
    right = max(MARGIN + len(heading) * _TITLE, 560.0)
    for block in section.blocks:
        placed = _block(block, y)
        body += placed.parts
        y += placed.height
        right = max(right, placed.right)
    parts.append(tag("path", class_="rail", d=f"M{MARGIN + 5} {start}V{y - 4:.5g}"))
    width, height = min(WIDTH, right + MARGIN), y + MARGIN - 12
    style = Markup(data_text("layer.css") + rules(num_groups(plan.tp_size)).replace(".t", "text.t"))
    card = tag("rect", class_="card", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=9)
    whole = tag(
        "svg",
        tag("title", heading),
        tag("style", style),
        _hatch(),
        card,
        *parts,
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.5g} {height:.5g}",
        width=width,
        height=height,
        role="img",
    )
    return f"{whole}\n"


def _largest(drawn: Picture) -> Section:
    """The kind of layer that holds most of the model's elements."""
    nothing = Section(stem="", numbers=(), num_layers=0, blocks=())
    return max(drawn.sections, key=lambda one: (bool(one.numbers), len(one.numbers) * _elements(one)), default=nothing)


def _elements(section: Section) -> int:
    stages = (stage for block in section.blocks for stage in block.stages)
    return sum(weight.count * math.prod(weight.shape) for stage in stages for weight in stage.weights)


def _hatch() -> Markup:
    line = tag("path", d="M-1 1l2 -2M0 6l6 -6M5 7l2 -2", stroke_width=1.1)
    return tag("defs", tag("pattern", line, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse"))


def _text(x: float, y: float, said: str, class_: str | None = None) -> Markup:
    return tag("text", said, x=round(x, 1), y=round(y, 1), class_=class_)


def _keys(tp_size: int, y: float) -> Iterator[Markup]:
    x = MARGIN
    if tp_size <= 8:
        for rank in range(tp_size):
            yield tag("rect", class_=f"r{rank}", x=x, y=y - 10, width=12, height=12, rx=2)
            yield _text(x + 18, y, f"rank {rank}", "soft")
            x += 72
    else:
        for group in range(num_groups(tp_size)):
            yield tag("rect", class_=f"r{group}", x=x, y=y - 10, width=4, height=12)
            x += 4
        yield _text(x + 8, y, f"ranks 0 to {tp_size - 1}", "soft")
        x += 120
    for class_ in ("all", "hatch"):
        yield tag("rect", class_=class_, x=x, y=y - 10, width=12, height=12)
    yield _text(x + 18, y, "on every rank", "soft")


def _block(block: Block, y: float) -> Placed:
    """A block from `y` down: its name, what comes before, the stages side by side, what comes after."""
    parts: list[Markup] = []
    start = y
    if block.name:
        parts.append(tag("circle", class_="ring", cx=MARGIN + 5, cy=y + 8, r=4.5))
        parts.append(_text(MARGIN + 26, y + 12, plain(block.name, 60), "name"))
        y += 24
    for one in block.before:
        parts += _collective(one, y)
        y += 24
    x = right = MARGIN + 26
    row = 0.0
    for at, stage in enumerate(block.stages):
        width = _stage_width(stage)
        if at:
            parts.append(_text(x + _STAGE_GAP / 2 - 8, y + 44, "\u2192", "soft"))
            right = max(right, x + _STAGE_GAP / 2)
            if x + _STAGE_GAP + width > WIDTH - MARGIN:
                y, x, row = y + row + 12, MARGIN + 26, 0.0
            else:
                x += _STAGE_GAP
        placed = _stage(stage, x, y, bool(block.name))
        parts += placed.parts
        row = max(row, placed.height)
        x += width
        right = max(right, placed.right)
    y += row
    for one in block.after:
        parts += _collective(one, y)
        y += 24
    return Placed(tuple(parts), y - start + 12, right)


def _collective(one: Collective, y: float) -> Iterator[Markup]:
    yield tag("circle", class_="back" if one.backward else "dot", cx=MARGIN + 5, cy=y + 8, r=4.5)
    when = "in backward: " if one.backward else ""
    yield tag(
        "text",
        when,
        tag("tspan", one.what, class_="what"),
        f" {plain(one.why, 70)}",
        x=MARGIN + 26,
        y=y + 12,
        class_="soft",
    )


def _lines(weight: Weight) -> list[str]:
    """The lines under a weight: its name, its shape, and what each rank holds of it."""
    if len(weight.shape) < 2:
        return [label(weight), words.shape(weight.shape)]
    held = "all" if weight.drawing.is_shared else weight.share
    copies = f" \u00b7 {weight.count} of them" if weight.count > 1 else ""
    size_line = f"{human_bytes(weight.rank_bytes)} each"
    return [label(weight), words.shape(weight.shape) + copies, held, size_line, *weight.notes]


def _weight_width(weight: Weight) -> float:
    name, *others = _lines(weight)
    return max(size(weight.drawing)[0], len(name) * _MONO, *(len(line) * _SANS for line in others))


def _rows(stage: Stage) -> list[list[Weight]]:
    """The weights of a stage in rows that fit on the picture; matrices and vectors apart."""
    rows: list[list[Weight]] = []
    for is_matrix in (True, False):
        room = 0.0
        for weight in (one for one in stage.weights if (len(one.shape) > 1) == is_matrix):
            width = _weight_width(weight) + _GAP
            if room < width or not rows:
                rows.append([])
                room = WIDTH - 2 * MARGIN - 26 + _GAP
            rows[-1].append(weight)
            room -= width
    return rows


def _row_width(row: Sequence[Weight]) -> float:
    return sum(map(_weight_width, row)) + _GAP * (len(row) - 1)


def _stage_width(stage: Stage) -> float:
    return max([len(STYLES[stage.style]) * _SANS, *map(_row_width, _rows(stage))])


def _stage(stage: Stage, x: float, y: float, headed: bool) -> Placed:
    if not headed and all(weight.style == "replicated" and len(weight.shape) < 2 for weight in stage.weights):
        return _thin(stage, x, y)
    parts: list[Markup] = []
    start = y
    if headed or any(len(weight.shape) > 1 for weight in stage.weights):
        parts.append(_text(x, y + 11, STYLES[stage.style], "soft"))
        y += 20
    for row in _rows(stage):
        height = max(size(weight.drawing)[1] for weight in row)
        at = x
        for weight in row:
            own = size(weight.drawing)[1]
            parts.append(weight_svg(weight.drawing, describe(weight), at, y + height - own))
            for number, line in enumerate(_lines(weight)):
                parts.append(_text(at, y + height + 15 + number * _LINE, line, "soft" if number else "name"))
            at += _weight_width(weight) + _GAP
        y += height + 8 + _LINE * max(len(_lines(weight)) for weight in row) + 6
    return Placed(tuple(parts), y - start, x + _stage_width(stage))


def _thin(stage: Stage, x: float, y: float) -> Placed:
    """Norms, a line for each: the strip, then the name and the shape."""
    parts: list[Markup] = []
    right = x
    for number, weight in enumerate(stage.weights):
        width, height = size(weight.drawing)
        top, name = y + 20 * number, label(weight)
        said = tag(
            "text",
            tag("tspan", name, class_="name"),
            f"\u2002{words.shape(weight.shape)}",
            class_="soft",
            x=x + width + 10,
            y=top + 12,
        )
        parts += [weight_svg(weight.drawing, describe(weight), x, top + 8 - height / 2), said]
        right = max(right, x + width + 10 + len(name) * _MONO + 60)
    return Placed(tuple(parts), 20.0 * len(stage.weights), right)
