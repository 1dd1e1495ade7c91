"""What is drawn of a plan: its weights with their geometry, in stages of blocks of layers, with their collectives."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autotp_plan.planner.pictures import layers
from autotp_plan.planner.pictures.geometry import Drawing, draw
from autotp_plan.planner.plan_table import elements_per_rank, share_words
from autotp_plan.schemas.names import num_names
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.entries import Parameter, PlannedModule, Style
from autotp_plan.schemas.plan.stream_places import Modules, Stream
from autotp_plan.schemas.storage.safetensors_header import item_size

MOST_WEIGHTS, MOST_GROUPS, ALL_PIECES = 240, 40, 12_000
"""What is drawn of a plan at most: weights, kinds of layers, pieces in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of a layer. `rank_bytes` are those of the rank that holds most, of one layer.

    `tied_to` is the weight that this is another name of; the bytes are that one's.
    """

    name: str
    label: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    style: Style
    share: str
    rule: str
    rank_bytes: int
    notes: tuple[str, ...]
    drawing: Drawing
    tied_to: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """What ranks exchange at a place: `what` in the field's word, and why. `backward` for a gradient's."""

    what: str
    why: str
    backward: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Weights of one style that an input passes at the same time."""

    style: Style
    weights: tuple[Weight, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A part of a layer, such as its attention: stages one after the other, collectives before and after."""

    name: str
    stages: tuple[Stage, ...]
    before: tuple[Collective, ...] = ()
    after: tuple[Collective, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Layers that are the same, or weights outside of layers (no `numbers`)."""

    stem: str
    numbers: tuple[int, ...]
    num_layers: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The model from top to bottom. `not_drawn` counts entries that are only in the table."""

    tp_size: int
    sections: tuple[Section, ...]
    not_drawn: int

    def weights(self) -> Iterator[Weight]:
        """Every weight that is drawn, from top to bottom."""
        for section in self.sections:
            for block in section.blocks:
                for stage in block.stages:
                    yield from stage.weights


def picture(plan: Plan) -> Picture:
    """What is drawn of a plan."""

    @functools.cache
    def drawing(layout: str, shape: tuple[int, ...], style: Style) -> Drawing:
        return draw(plan.layouts[layout], shape, style, plan.tp_size)

    @functools.cache
    def held(layout: str) -> tuple[str, int]:
        one = plan.layouts[layout]
        return share_words(one, plan.tp_size), max(elements_per_rank(one, plan.tp_size))

    sections: list[Section] = []
    weights = pieces = 0
    drawn: set[str] = set()
    tied = {tie.name: tie.to for tie in plan.tied}
    stream = Stream.of(plan)
    entries = [*plan.parameters, *_ties(plan)]
    for group in layers.groups(entries, plan.modules)[:MOST_GROUPS]:
        kept = []
        for label, entry in group.entries:
            one = drawing(entry.layout, plan.shape_of(entry), entry.style)
            if weights >= MOST_WEIGHTS or pieces + len(one.pieces) > ALL_PIECES:
                continue
            weights, pieces = weights + 1, pieces + len(one.pieces)
            drawn.add(entry.name)
            share, most = held(entry.layout)
            count = num_names(label)
            kept.append(
                Weight(
                    name=entry.name,
                    label=label,
                    count=count,
                    shape=plan.shape_of(entry),
                    dtype=entry.dtype,
                    style=entry.style,
                    share=share,
                    rule=str(entry.rule),
                    rank_bytes=count * most * item_size(entry.dtype),
                    notes=_notes(entry, group.modules.get(label.rpartition(".")[0])),
                    drawing=one,
                    tied_to=tied.get(entry.name),
                )
            )
        if kept:
            blocks = _blocks(kept, group, plan.tp_size, stream)
            sections.append(
                Section(stem=group.stem, numbers=group.numbers, num_layers=group.num_layers, blocks=tuple(blocks))
            )
    return Picture(
        tp_size=plan.tp_size, sections=tuple(sections), not_drawn=len({entry.name for entry in entries} - drawn)
    )


def _notes(entry: Parameter, module: PlannedModule | None) -> tuple[str, ...]:
    """What is special of a weight, and what ranks exchange at the output of its own module."""
    said = {
        "output gathered": entry.gather_output,
        "gradient all-reduced": entry.partial_gradient,
        "added once": entry.add_once,
        "input split": entry.split_input,
        "its mean all-reduced": module is not None and module.mean_over_ranks,
    }
    notes = tuple(note for note, is_so in said.items() if is_so)
    if module is None or module.output is None or module.output.operation != "copy":
        return notes
    interval = module.output.interval
    part = f" [{interval[0]}, {interval[1]})" if interval else ""
    return (*notes, f"gradient of its output{part} all-reduced")


def _ties(plan: Plan) -> Iterator[Parameter]:
    """The second names of weights, as entries of their own: their modules run in another style."""
    by_name = {entry.name: entry for entry in plan.parameters} if plan.tied else {}
    for tie in plan.tied:
        if tie.to in by_name:
            same = by_name[tie.to]
            yield dataclasses.replace(
                same, name=tie.name, style=tie.style, rule=tie.rule, gather_output=tie.gather_output
            )


def _blocks(weights: Sequence[Weight], group: layers.Group, tp_size: int, stream: Stream | None) -> list[Block]:
    by_block: dict[tuple[str, str], list[Weight]] = defaultdict(list)
    modules = {label.rpartition(".")[0] for label, _ in group.entries if label.endswith(".weight")}
    for weight in weights:
        name = layers.block_of(weight.label, modules) if group.numbers else ""
        place = layers.norm_place(weight.label) if group.numbers and not name else ""
        by_block[name, place].append(weight)
    found = []
    for (name, _), of in by_block.items():
        stages = []
        styles = {weight.label: weight.style for weight in of}
        for style in layers.STAGES:
            same = [weight for weight in of if styles.get(_weight_of(weight.label), weight.style) == style]
            if same:
                stages.append(Stage(style=style, weights=tuple(sorted(same, key=_matrices_first))))
        before, after = _collectives(of, tp_size, bool(group.numbers))
        if group.numbers and name in group.modules:
            found_before, found_after = _crossings(group.modules[name])
            before, after = before + found_before, after + found_after
        if stream is not None and not group.numbers:
            before, after = _outside(of, before, after)
        elif stream is not None:
            before, after = _around(stream, f"{group.stem}.{group.numbers[0]}", name, of, before, after)
        found.append(Block(name=name, stages=tuple(stages), before=tuple(before), after=tuple(after)))
    return sorted(found, key=lambda block: (layers.block_place(block.name, _labels(block)), block.name))


def _labels(block: Block) -> list[str]:
    return [weight.label for stage in block.stages for weight in stage.weights]


def _weight_of(label: str) -> str:
    """The weight that a bias belongs to, by its name; that of what is no bias does not matter."""
    return label.removesuffix("bias") + "weight"


def _matrices_first(weight: Weight) -> tuple[bool, bool, bool, int]:
    """Matrices before vectors, queries before keys, weights before biases, large before small."""
    is_query = weight.label.rpartition(".")[0].rpartition(".")[2].startswith("q")
    return len(weight.shape) < 2, not is_query, weight.label.endswith("bias"), -math.prod(weight.shape)


def _collectives(weights: Sequence[Weight], tp_size: int, in_layer: bool) -> tuple[list[Collective], list[Collective]]:
    """What the styles of a block's matrices make the ranks exchange."""
    matrices = [weight for weight in weights if len(weight.shape) > 1 and tp_size > 1]
    styles = [weight.style for weight in matrices]
    before, after = [], []
    if "column" in styles:
        before.append(
            Collective(what="all-reduce", why="of the gradient of the column-parallel layers' input", backward=True)
        )
    if "vocab" in styles:
        after.append(Collective(what="all-reduce", why="each rank has looked up the tokens of its rows"))
    if rows := styles.count("row"):
        times = f" x {rows}" if rows > 1 else ""
        after.append(Collective(what=f"all-reduce{times}", why=f"sums the partial outputs of {tp_size} ranks"))
    if any("output gathered" in weight.notes for weight in matrices):
        lazily = "" if in_layer else ", unless only the loss of the labels reads it"
        after.append(Collective(what="all-gather", why=f"every rank gets the full output{lazily}"))
    if any("input split" in weight.notes for weight in matrices):
        before.append(Collective(what="all-reduce", why="of the split input's gradient", backward=True))
    return before, after


def _around(
    stream: Stream, layer: str, block: str, of: Sequence[Weight], before: list[Collective], after: list[Collective]
) -> tuple[list[Collective], list[Collective]]:
    """The collectives of a block, those along the sequence in the place of those that they replace.

    A block that lies deeper in a module that is gathered or scattered keeps its collectives.
    """
    modules = [f"{layer}.{weight.label}".rpartition(".")[0] for weight in of]
    depth = layer.count(".") + len(block.split("."))

    def here(places: Modules) -> set[str]:
        found = {place for module in modules if (place := places.holding(module)) is not None}
        return {place for place in found if place.count(".") >= depth}

    if here(stream.gather):
        before = [_GATHERED, _GATHERED_BACK, *(one for one in before if one.what != "all-reduce")]
    scattered = here(stream.scatter)
    if any(place in stream.rows for place in scattered):
        after = [_SCATTERED, *(one for one in after if not one.what.startswith("all-reduce"))]
    elif scattered:
        why = f"of the gradient: each rank took its tokens of what {block or 'the layer'} gives"
        after = [*after, Collective(what="all-gather", why=why, backward=True)]
    return before, after


def _outside(
    of: Sequence[Weight], before: list[Collective], after: list[Collective]
) -> tuple[list[Collective], list[Collective]]:
    """The collectives of an embedding in front of a sharded stream, or of a head behind it."""
    if any("output gathered" in weight.notes for weight in of):
        return [_GATHERED, _GATHERED_BACK, *(one for one in before if not one.backward)], after
    return before, [_LOOKED_UP if one.what == "all-reduce" else one for one in after]


_LOOKED_UP = Collective(
    what="reduce-scatter", why="of what is looked up; an all-reduce unless it goes straight to the layers"
)
_GATHERED = Collective(what="all-gather", why="along the sequence: every rank is given all tokens")
_GATHERED_BACK = Collective(what="reduce-scatter", why="of the gradient, along the sequence", backward=True)
_SCATTERED = Collective(what="reduce-scatter", why="sums the partial outputs; each rank has its tokens of them")


def _crossings(module: PlannedModule) -> tuple[list[Collective], list[Collective]]:
    before = [
        Collective(what="all-reduce", why=f"of the gradient of {name}", backward=True)
        for name, crossing in module.inputs.items()
        if crossing.operation == "copy"
    ]
    if module.output is not None and module.output.operation == "reduce":
        return before, [Collective(what="all-reduce", why="sums the partial outputs")]
    return before, []
