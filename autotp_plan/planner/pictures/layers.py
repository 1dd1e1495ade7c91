"""A model from top to bottom: which layers are the same, and which weights follow each other in one.

A plan holds no order of execution. What comes first is told from styles (column-parallel before row-parallel) and from
names (embeddings, attention, MLP, norms, head), and the page says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.entries import Parameter, Style

_LAYER = re.compile(r"((?:[^.{]+\.)*?)(\{[^}]*\}|\d+)\.(.+)", re.DOTALL)
STAGES: tuple[Style, ...] = ("replicated", "vocab", "column", "shard", "row")
"""In the order in which an input passes them."""
_TOWER = re.compile(r"vision|visual|image|audio|multi_modal|patch", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|wte|wpe", re.IGNORECASE)
_HEAD = re.compile(r"lm_head|embed_out|output|score|classifier", re.IGNORECASE)
_ATTENTION = re.compile(r"att|mixer|mamba|ssm|conv", re.IGNORECASE)
_NORM = re.compile(r"norm|ln", re.IGNORECASE)
_BEFORE_MLP = re.compile(r"post_?att|pre_?(ff|feed|mlp)|ln_?2|norm_?2|ffn|mlp", re.IGNORECASE)
_AFTER_MLP = re.compile(r"post_?(ff|feed|mlp)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Entries of a plan that are drawn together, each with its name inside the group.

    `numbers` are the layers that are the same, of `num_layers`; both are empty for what is outside of layers. `stem` is
    the name of the list of layers: `model.layers`.
    """

    stem: str
    numbers: tuple[int, ...]
    num_layers: int
    entries: tuple[tuple[str, Parameter], ...]


def split_layer(name: str) -> tuple[str, str, str] | None:
    """`model.layers.{0..31}.mlp.up_proj.weight` as its stem, its numbers and the rest; None outside of layers."""
    match = _LAYER.fullmatch(name)
    if match is None or ("{" not in match[2] and match[3].count(".") == 0):
        return None
    return match[1].rstrip("."), match[2], match[3]


def groups(entries: Iterable[Parameter]) -> list[Group]:
    """All entries in groups, from top to bottom: layers with the same entries are one group."""
    outside: dict[tuple[int, str], list[tuple[str, Parameter]]] = defaultdict(list)
    stems: dict[str, list[tuple[str, str, Parameter]]] = defaultdict(list)
    for entry in entries:
        parts = split_layer(entry.name)
        if parts is None:
            outside[_place_outside(entry), ""].append((entry.name, entry))
        else:
            stems[parts[0]].append((parts[1], parts[2], entry))
    found = [
        (place, 0, Group(stem="", numbers=(), num_layers=0, entries=tuple(sorted(of, key=_by_place))))
        for (place, _), of in outside.items()
    ]
    for stem, of in stems.items():
        found += [(0 if _TOWER.search(stem) else 2, 1, group) for group in _same_layers(stem, of)]
    return [group for _, _, group in sorted(found, key=lambda one: (one[0], one[1], one[2].stem, one[2].numbers))]


def _same_layers(stem: str, entries: Sequence[tuple[str, str, Parameter]]) -> list[Group]:
    by_number: dict[int, list[int]] = defaultdict(list)
    for at, (numbers, _, _) in enumerate(entries):
        for number in expand(numbers):
            by_number[int(number)].append(at)
    by_entries: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer, held in sorted(by_number.items()):
        by_entries[tuple(held)].append(layer)
    return [
        Group(
            stem=stem,
            numbers=tuple(layers),
            num_layers=len(by_number),
            entries=tuple((entries[at][1], entries[at][2]) for at in held),
        )
        for held, layers in by_entries.items()
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
