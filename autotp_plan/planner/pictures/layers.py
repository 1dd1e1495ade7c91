"""A model from top to bottom: which layers are the same, and which weights follow each other in one.

A plan holds no order of execution. What comes first is told from styles (column-parallel before row-parallel) and from
names (embeddings, attention, MLP, norms, head), and the page says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.entries import Parameter, PlannedModule, Style

_LAYER = re.compile(r"((?:[^.{]+\.)*?)(\{[^}]*\}|\d+)\.(.+)", re.DOTALL)
STAGES: tuple[Style, ...] = ("replicated", "vocab", "column", "shard", "row")
"""In the order in which an input passes them."""
_TOWER = re.compile(r"vision|visual|image|audio|multi_modal|patch", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|wte|wpe", re.IGNORECASE)
_HEAD = re.compile(r"lm_head|embed_out|output|score|classifier", re.IGNORECASE)
_ATTENTION = re.compile(r"att|mixer|mamba|ssm|conv", re.IGNORECASE)
_NORM = re.compile(r"norm|ln", re.IGNORECASE)
_BEFORE_MLP = re.compile(r"post_?att|pre_?(ff|feed|mlp)|ln_?2|norm_?2|ffn|mlp|final", re.IGNORECASE)
_AFTER_MLP = re.compile(r"post_?(ff|feed|mlp)", re.IGNORECASE)


_Found = tuple[str, str, Parameter | PlannedModule]
"""The numbers of layers, the name in a layer, and what has that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Entries of a plan that are drawn together, each with its name inside the group.

    `numbers` are the layers that are the same, of `num_layers`; both are empty for what is outside of layers. `stem` is
    the name of the list of layers: `model.layers`. `modules` have collectives, by their names inside the group.
    """

    stem: str
    numbers: tuple[int, ...]
    num_layers: int
    entries: tuple[tuple[str, Parameter], ...]
    modules: dict[str, PlannedModule] = field(default_factory=dict)


def split_layer(name: str) -> tuple[str, str, str] | None:
    """`model.layers.{0..31}.mlp.up_proj.weight` as its stem, its numbers and the rest; None outside of layers."""
    match = _LAYER.fullmatch(name)
    if match is None or ("{" not in match[2] and match[3].count(".") == 0):
        return None
    return match[1].rstrip("."), match[2], match[3]


def groups(entries: Iterable[Parameter], modules: Iterable[PlannedModule] = ()) -> list[Group]:
    """All entries in groups, from top to bottom.

    Args:
        entries: the parameters of a plan.
        modules: those with collectives.

    Returns:
        layers with the same entries and modules as one group; what is outside of layers by its place.
    """
    outside: dict[int, list[tuple[str, Parameter]]] = defaultdict(list)
    stems: dict[str, list[_Found]] = defaultdict(list)
    outer_modules: dict[str, PlannedModule] = {}
    for module in modules:
        parts = split_layer(f"{module.module}.weight")
        if parts is None:
            outer_modules[module.module] = module
        else:
            stems[parts[0]].append((parts[1], parts[2].rpartition(".")[0], module))
    for entry in entries:
        parts = split_layer(entry.name)
        if parts is None:
            outside[_place_outside(entry)].append((entry.name, entry))
        else:
            stems[parts[0]].append((parts[1], parts[2], entry))
    found = [
        (
            place,
            0,
            Group(stem="", numbers=(), num_layers=0, entries=tuple(sorted(of, key=_by_place)), modules=outer_modules),
        )
        for place, of in outside.items()
    ]
    for stem, parts_of in stems.items():
        found += [(0 if _TOWER.search(stem) else 2, 1, group) for group in _same_layers(stem, parts_of)]
    return [group for _, _, group in sorted(found, key=lambda one: (one[0], one[1], one[2].stem, one[2].numbers))]


def _same_layers(stem: str, found: Sequence[_Found]) -> list[Group]:
    by_number: dict[int, list[int]] = defaultdict(list)
    for at, (numbers, _, _) in enumerate(found):
        for number in expand(numbers):
            by_number[int(number)].append(at)
    by_contents: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer, held in sorted(by_number.items()):
        by_contents[tuple(held)].append(layer)
    return [
        Group(
            stem=stem,
            numbers=tuple(layers),
            num_layers=len(by_number),
            entries=tuple((found[at][1], one) for at in held if isinstance(one := found[at][2], Parameter)),
            modules={found[at][1]: one for at in held if isinstance(one := found[at][2], PlannedModule)},
        )
        for held, layers in by_contents.items()
    ]


def _place_outside(entry: Parameter) -> int:
    module = entry.name.rpartition(".")[0] or entry.name
    if _TOWER.search(entry.name):
        return 0
    if _HEAD.search(module) and entry.style in ("column", "replicated"):
        return 4
    return 1 if entry.style == "vocab" or _EMBEDDING.search(module) else 3


def _by_place(one: tuple[str, Parameter]) -> int:
    return STAGES.index(one[1].style)


def block_of(name: str, modules: Collection[str]) -> str:
    """The block of a layer that a weight is drawn in: `self_attn` for `self_attn.q_proj.weight`, or an empty name.

    A parameter of a module with a weight belongs to what holds that module, any other to its module.

    Args:
        name: of the parameter, in its layer.
        modules: those that have a weight.
    """
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] if module in modules else module


def block_place(block: str, names: Sequence[str]) -> int:
    """Where a block stands in its layer, by its name and its weights': norms, attention, MLP, what comes after."""
    if not block:
        first = names[0]
        if _AFTER_MLP.search(first):
            return 5
        return 3 if _BEFORE_MLP.search(first) else 0
    return 1 if _ATTENTION.search(block) else 4


def norm_place(name: str) -> str:
    """What tells apart the norms of a layer that stand at different places; empty for no norm."""
    if not _NORM.search(name):
        return ""
    if _AFTER_MLP.search(name):
        return "after"
    return "middle" if _BEFORE_MLP.search(name) else "before"
