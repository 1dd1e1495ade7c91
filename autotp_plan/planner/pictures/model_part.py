"""The model on the page, top to bottom: layers that are the same as one card, with the flow of an input through it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from autotp_plan.planner.pictures import words
from autotp_plan.planner.pictures.facts import Block, Collective, Picture, Section, Stage, Weight
from autotp_plan.planner.pictures.geometry import LONGEST, MOST_PIECES, SCALE
from autotp_plan.planner.pictures.markup import Markup, plain, tag
from autotp_plan.planner.pictures.weight_svg import weight_svg
from autotp_plan.planner.plan_table import human_bytes

STYLES = {
    "replicated": "replicated",
    "vocab": "vocabulary-parallel",
    "column": "column-parallel",
    "shard": "sharded",
    "row": "row-parallel",
}
_MOST_TICKS = 400


def model_section(picture: Picture) -> Markup:
    """The section of the page that draws the model."""
    how = (
        "A matrix is drawn with its output from left to right and its input from top to bottom: a column-parallel "
        "weight falls into columns, a row-parallel one into rows. (What is only called sharded has the first of its "
        f"two last dimensions from left to right.) A side of n indices is {SCALE:g}\u221an pixels long, at most "
        f"{LONGEST:g} and less on a narrow screen: four times the parameters have twice the area. Within a weight, "
        "parts are to linear scale. Brackets hold the parts of a fused weight together. The order is told from names "
        "and styles: a plan does not hold it."
    )
    children = [tag("p", how, class_="how"), *map(_part, picture.sections)]
    if picture.not_drawn:
        said = f"{picture.not_drawn:,} further entries are not drawn: the page is kept short."
        children.append(tag("p", said, class_="note"))
    if not all(weight.drawing.is_complete for weight in picture.weights()):
        said = f"Of weights with more than {MOST_PIECES} pieces, the first {MOST_PIECES} are drawn."
        children.append(tag("p", said, class_="note"))
    return tag("section", tag("h2", "The model, top to bottom"), *children, id="model")


def title(section: Section) -> str:
    """`Layers 0 to 31`, `Layer 0`, or what is outside of layers."""
    if section.numbers:
        return f"Layer{'s' if len(section.numbers) > 1 else ''} {words.numbers(section.numbers)}"
    labels = _labels(section)
    return plain(labels[0], 80) if len(labels) == 1 else "Outside of layers"


def _labels(section: Section) -> list[str]:
    return [weight.label for block in section.blocks for stage in block.stages for weight in stage.weights]


def _module_of(section: Section) -> str:
    """The module that several weights outside of layers are in; empty for one weight, or where they have none."""
    labels = [label.split(".")[:-1] for label in _labels(section)]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*labels))
    return ".".join(parts[0] for parts in same) if len(labels) > 1 else ""


def _part(section: Section) -> Markup:
    several = len(section.numbers) > 1
    stem = plain(section.stem if section.numbers else _module_of(section))
    said = f"{len(section.numbers)} layers of {stem}, all the same" if several else stem
    return tag(
        "article",
        tag("div", tag("h3", title(section)), tag("span", said, class_="stem"), class_="title"),
        *_strip(section),
        tag("div", *map(_block, section.blocks), class_="flow"),
        class_="part many-layers" if several else "part",
    )


def _strip(section: Section) -> Iterator[Markup]:
    """A tick for each layer of the model, dark for those that are drawn here; nothing where that is all."""
    if not section.numbers or section.num_layers == len(section.numbers):
        return
    count = max(section.num_layers, section.numbers[-1] + 1)
    if count > _MOST_TICKS:
        return
    held = set(section.numbers)
    ticks = {True: "", False: ""}
    for layer in range(count):
        ticks[layer in held] += f"M{layer * 10} 0h8v9h-8z"
    yield tag(
        "svg",
        tag("path", class_="off", d=ticks[False]),
        tag("path", class_="on", d=ticks[True]),
        class_="strip",
        viewBox=f"0 0 {count * 10} 9",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _block(block: Block) -> Markup:
    name = [tag("span", plain(block.name), class_="name")] if block.name else []
    return tag(
        "div",
        *name,
        *map(_collective, block.before),
        tag("div", *map(_stage, block.stages), class_="stages"),
        *map(_collective, block.after),
        class_="block",
    )


def _collective(one: Collective) -> Markup:
    when = "in backward: " if one.backward else ""
    return tag(
        "p", when, tag("b", one.what), " ", plain(one.why), class_="passes backward" if one.backward else "passes"
    )


def _stage(stage: Stage) -> Markup:
    matrices = [weight for weight in stage.weights if len(weight.shape) > 1]
    strips = [weight for weight in stage.weights if len(weight.shape) < 2]
    if not matrices and {weight.style for weight in strips} == {"replicated"}:
        return tag("div", tag("div", *map(_figure, strips), class_="strips"), class_="stage thin")
    return tag(
        "div",
        tag("p", STYLES[stage.style], class_="style"),
        *([tag("div", *map(_figure, matrices), class_="weights")] if matrices else []),
        *([tag("div", *map(_figure, strips), class_="strips")] if strips else []),
        class_="stage",
    )


def label(weight: Weight) -> str:
    """The name of a weight in its block: `q_proj`, `q_proj.bias`, `A_log`."""
    parts = weight.label.removesuffix(".weight").split(".")
    return plain(".".join(parts[-2:] if parts[-1] == "bias" or parts[-1].isdecimal() else parts[-1:]), 60)


def describe(weight: Weight) -> str:
    """All about a weight, for a screen reader and a pointer."""
    facts = (words.shape(weight.shape), weight.dtype, STYLES[weight.style], weight.share, weight.rule, *weight.notes)
    return f"{plain(weight.name)}: {', '.join(map(plain, facts))}"


def _figure(weight: Weight) -> Markup:
    copies = f" \u00b7 {weight.count} of them" if weight.count > 1 else ""
    held = "all" if weight.drawing.is_shared else weight.share
    size = human_bytes(weight.rank_bytes).replace(" ", "\u00a0")
    lines = [f"{words.shape(weight.shape)}{copies}", f"{held} \u00b7 {size}", *weight.notes]
    if weight.tied_to is not None:
        lines[1] = f"the same weight as {plain(weight.tied_to, 80)}"
    if len(weight.shape) < 2:
        on_all = ["on every rank"] if weight.style == "replicated" else []
        lines = [" \u00b7 ".join([lines[0], *on_all, *weight.notes])]
    else:
        lines.append(plain(weight.rule, 60))
    caption = tag("figcaption", tag("b", label(weight)), *(tag("i", line) for line in lines))
    return tag("figure", weight_svg(weight.drawing, describe(weight)), caption, data_name=plain(weight.name))
