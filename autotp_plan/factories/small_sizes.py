"""The integer arguments of a function that makes a model: what each of them counts, and values for small models.

What an argument does is tried on meta: names of parameters that go count layers, shapes that change are widths. Numbers
of heads are known by their names, because a width may be divided by them without any shape showing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.schemas.errors import OptionError
from autotp_plan.schemas.names import is_index

Changes = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

_WORDS = 256
_LENGTH = 64
_HEAD_DIM = 4
"""Heads stay a multiple of this wide."""
_NARROWEST = 8
"""Numbers below are ratios of widths and the like."""
_VOCABULARY = ("vocab", "num_tokens", "n_tokens", "num_embeddings")
_LENGTHS = ("length", "position", "context", "block_size", "seq", "ctx", "window")
_COUNTS = ("expert", "top_k", "topk", "group", "seed", "token", "_id", "idx", "pad", "kernel", "conv")
_NO_COUNT = ("dim", "size", "width", "features")
_SHARED = ("kv", "key_value", "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """What the integer arguments of a model's function count.

    Attributes:
        values: each argument, as it is in the model.
        widths: numbers of features, the one that most parameters follow first.
        heads: numbers of heads; `kv_heads`, of those that several heads share.
        layers: the number of layers, with how many of the first ones include every kind.
        lists: arguments with an entry for each layer, with the entries of those layers.
        words: sizes of vocabularies.
        lengths: numbers of tokens.
    """

    values: Mapping[str, int]
    widths: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    lists: Mapping[str, list[Any]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()

    @property
    def num_heads(self) -> int:
        """The number of heads; 1 where no argument says it."""
        return next((self.values[key] for key in self.heads), 1)

    def short(self) -> Changes:
        """Fewer layers, words and tokens; a position table stays long enough for what a small model is run on."""
        return {
            **self.layers,
            **self.lists,
            **{key: min(self.values[key], _WORDS) for key in self.words},
            **{key: min(self.values[key], _LENGTH) for key in self.lengths},
        }

    def divided(self) -> Iterator[tuple[int, Changes]]:
        """Models with all widths divided by a number, and as many heads: number and arguments, small ones first."""
        widths = [self.values[key] for key in self.widths]
        common, unit = math.gcd(*widths) if widths else 1, _HEAD_DIM * self.num_heads
        for divisor in sorted((d for d in range(1, common + 1) if common % d == 0), reverse=True):
            found = {key: self.values[key] // divisor for key in self.widths}
            hidden = [(self.values[key], found[key]) for key in self.widths[:1]]
            heads_stay = all(new % unit == 0 for old, new in hidden if old % unit == 0)
            if divisor == 1 or (heads_stay and all(value >= 4 and value % 2 == 0 for value in found.values())):
                yield divisor, {**self.short(), **found}

    def pairs(self) -> Iterator[tuple[Changes, Changes]]:
        """Two small models each, of other sizes: first each width for itself, then as they go together.

        No number of heads is that of a head's features, so that a count of what depends on an index says which it is.
        """
        if not self.widths and not self.heads:
            return
        for tied in (False, True):
            yield self._small(8, 2, 16, 5, tied), self._small(6, 3, 24, 9, tied)
        for divisor, found in self.divided():
            more = {key: 2 * value for key, value in found.items() if key in self.widths and "head" not in key}
            heads = {key: 2 * self.values[key] for key in (*self.heads, *self.kv_heads)}
            yield found, {**found, **more, **heads}
            if divisor == 1:
                return

    def _small(self, heads: int, kv_heads: int, head_dim: int, first: int, tied: bool) -> Changes:
        old_heads, found = self.num_heads, self.short()
        found |= dict.fromkeys(self.heads, heads)
        for key in self.kv_heads:
            old = self.values[key]
            found[key] = heads if old == old_heads else 1 if old == 1 else kv_heads
        of_heads = [key for key in self.widths if "head" in key]
        found |= {key: head_dim + 2 * place for place, key in enumerate(of_heads)}
        inner = old_heads * self.values[of_heads[0]] if of_heads else None
        by_old: dict[int, int] = {}
        numbers = iter(range(first, 10_000, 2))
        for key in self.widths:
            old = self.values[key]
            if key in of_heads:
                continue
            if tied and old == inner:
                found[key] = heads * head_dim
            elif tied and old in by_old:
                found[key] = by_old[old]
            else:
                unit = 2 * heads if old % (2 * old_heads) == 0 else 4
                found[key] = by_old[old] = unit * next(numbers)
        return found


def roles_of(factory: ModuleFactory, changes: Mapping[str, Any]) -> Roles:
    """What the integer arguments of a function count.

    Args:
        factory: the function.
        changes: arguments in addition to those of the factory.

    Raises:
        OptionError: the function cannot be called.
    """
    config = {**factory.config(), **changes}
    values = {key: value for key, value in config.items() if type(value) is int and value > 0}
    whole = shapes_of(factory.on_meta(changes))
    found: dict[str, list[str]] = {"widths": [], "heads": [], "kv_heads": [], "words": [], "lengths": []}
    layers: dict[str, int] = {}
    followed: dict[str, int] = {}
    for key, value in values.items():
        kind = _kind_by_name(key)
        if kind is None:
            kind, followed[key] = _kind_by_trying(factory, {**changes, key: value // 2 if value > 1 else 2}, whole)
        if kind == "layers":
            layers[key] = _layers_needed(whole, value)
        elif kind and (kind != "widths" or value >= _NARROWEST):
            found[kind].append(key)
    found["widths"].sort(key=lambda key: -followed.get(key, 0))
    lists = {
        key: value[: layers[name]]
        for key, value in config.items()
        for name in layers
        if isinstance(value, list) and len(value) == values[name]
    }
    return Roles(values=values, layers=layers, lists=lists, **{kind: tuple(keys) for kind, keys in found.items()})


def shapes_of(model: Any) -> Shapes:
    """The shape of every parameter."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _kind_by_name(key: str) -> str | None:
    """What an argument counts by its name; empty for what is left as it is, None for what must be tried."""
    is_width = any(word in key for word in _NO_COUNT)
    if any(word in key for word in _VOCABULARY):
        return "words"
    if any(word in key for word in _LENGTHS):
        return "lengths"
    if any(word in key for word in _SHARED) and not is_width:
        return "kv_heads" if "expert" not in key else ""
    if "head" in key and not is_width:
        return "heads"
    return "" if any(word in key for word in _COUNTS) and not is_width else None


def _kind_by_trying(factory: ModuleFactory, changes: Mapping[str, Any], whole: Shapes) -> tuple[str, int]:
    """What an argument counts by what changes with it, and how many parameters do."""
    try:
        other = shapes_of(factory.on_meta(changes))
    except OptionError:  # a size that does not go with the others: it can only be changed together with them
        return "widths", 0
    if other.keys() != whole.keys():
        return "layers", 0
    changed = sum(shape != whole[name] for name, shape in other.items())
    return "widths" if changed else "", changed


def _layers_needed(shapes: Shapes, depth: int) -> int:
    """How many of the first layers include every kind, two at least: by the parameters that each has."""
    lists: dict[str, dict[int, set[Any]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts) if is_index(part)), None)
        if at is not None:
            layers = lists.setdefault(".".join(parts[:at]), {})
            layers.setdefault(int(parts[at]), set()).add((".".join(parts[at + 1 :]), shape))
    numbered = next((layers for layers in lists.values() if layers.keys() == set(range(depth))), None)
    if numbered is None:
        return depth
    first: dict[Any, int] = {}
    for layer in range(depth):
        first.setdefault(frozenset(numbered[layer]), layer)
    return min(depth, max(2, 1 + max(first.values())))
