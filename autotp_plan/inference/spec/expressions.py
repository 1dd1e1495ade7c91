"""From the sizes of several small models to expressions of config keys: `2 * hidden_size`, `num_heads * head_dim`.

Pure: numbers in, text out. The simplest expression that is right in every model wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Values = tuple[int | None, ...]
"""A number in each of the models; None where it is not known."""
Numbers = tuple[int, ...]

_IRRELEVANT = [
    "token_id",
    "max_position",
    "position_embeddings",
    "window",
    "layers",
    "layer_step",
    "n_positions",
    "n_ctx",
    "seq_len",
    "per_tok",
    "top_k",
    "topk",
    "group",
    "context",
    "batch",
    "factor",
    "interval",
    "range",
    "_period",
    "original_max",
    "logits",
    "return",
    "tp",
    "idx",
    "index",
    "init",
    "version",
    "beams",
    "length",
]
"""Parts of the keys that are no sizes of weights."""
_RELEVANT = ("n_groups", "mamba_n_groups", "mamba_ngroups")
"""Keys that are sizes although a part of them says otherwise: groups of heads in state-space mixers."""
_OTHERS = ("vision", "audio", "image", "video")
"""Parts of the keys of other models that one has inside."""


@dataclass(kw_only=True)
class Expressions:
    """Names and what they are in each model; finds expressions for other numbers."""

    names: dict[str, Numbers]
    found: dict[tuple[Values, bool], str | None] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Sequence[Mapping[str, int]], preferred: Sequence[str]) -> Expressions:
        """Of the integers of the models' configs; of keys that are always equal the preferred one counts."""
        keys = [key for key in models[0] if all(key in numbers for numbers in models)]
        keys = [key for key in keys if _may_be_a_size(key.rpartition(".")[2])]
        order = {key: place for place, key in enumerate(preferred)}
        keys.sort(
            key=lambda key: (any(word in key for word in _OTHERS), key.count("."), order.get(key, len(order)), key)
        )
        names: dict[str, Numbers] = {}
        for key in keys:
            values = tuple(numbers[key] for numbers in models)
            if values not in names.values() and len(set(values[:2])) > 1:
                names[key] = values
        for key in keys:  # what is the same in all, such as a number of experts
            values = tuple(numbers[key] for numbers in models)
            if values not in names.values() and "expert" in key and values[0] > 1:
                names[key] = values
        return cls(names=names)

    def find(self, values: Values, *, simple: bool = False) -> str | None:
        """The simplest expression that has these values; None where there is none.

        Args:
            values: in each model.
            simple: only names and numbers times names.
        """
        key = (values, simple)
        if key not in self.found:
            self.found[key] = next((text for text, got in self._candidates(simple) if _fits(got, values)), None)
        return self.found[key]

    def value(self, expression: str) -> Numbers:
        """What an expression that was found is in each model."""
        return next((got for text, got in self._candidates(False) if text == expression), ())

    def define(self, name: str, expression: str) -> None:
        """Add a name for an expression that was found; it is the first that is tried."""
        values = self.value(expression)
        self.names = {name: values, **{key: old for key, old in self.names.items() if key != name and old != values}}
        self.found.clear()

    def _candidates(self, simple: bool) -> Iterator[tuple[str, Numbers]]:
        names = list(self.names.items())
        yield from names
        for several, count in names:  # two shared experts are as many as the config says, and not two
            if "shared_expert" in several and len(set(count[:2])) == 1:
                yield from ((f"{several} * {name}", _times(count, values)) for name, values in names)
        for factor in (2, 3, 4):
            for name, values in names:
                yield f"{factor} * {name}", tuple(factor * value for value in values)
        if simple:
            return
        pairs = [(a, b) for a in names for b in names]
        for (a, x), (b, y) in pairs:
            if a <= b:
                yield f"{a} * {b}", _times(x, y)
        for (a, x), (b, y) in pairs:
            if a != b and _divides(y, x):
                yield f"{a} // {b}", _over(x, y)
        for (a, x), (b, y) in pairs:
            if a < b:
                yield f"{a} + {b}", tuple(p + q for p, q in zip(x, y))
        for factor in (2, 3, 4):
            for (a, x), (b, y) in pairs:
                if a <= b:
                    yield f"{factor} * {a} * {b}", tuple(factor * p * q for p, q in zip(x, y))
                if a != b and _divides(y, x):
                    yield f"{factor} * ({a} // {b})", tuple(factor * (p // q) for p, q in zip(x, y))
            for name, values in names:
                if all(value % factor == 0 for value in values[:2]):
                    yield f"{name} // {factor}", tuple(value // factor for value in values)
        for (a, x), (b, y) in pairs:
            if a == b or not _divides(y, x):
                continue
            for c, z in names:
                yield f"({a} // {b}) * {c}", tuple(p // q * r for p, q, r in zip(x, y, z))
            for c, z in names:
                for more in (1, 2, 3):
                    yield f"({a} // {b} + {more}) * {c}", tuple((p // q + more) * r for p, q, r in zip(x, y, z))
        for (a, x), (b, y) in pairs:
            for c, z in names:
                if a < b < c:
                    yield f"{a} + {b} + {c}", tuple(p + q + r for p, q, r in zip(x, y, z))
        for (a, x), (b, y) in pairs:
            for c, z in names:
                if a < b:
                    yield f"{c} * ({a} + {b})", tuple(r * (p + q) for p, q, r in zip(x, y, z))
                yield f"{a} + 2 * {b} * {c}", tuple(p + 2 * q * r for p, q, r in zip(x, y, z))


def _may_be_a_size(key: str) -> bool:
    return key in _RELEVANT or not any(word in key for word in _IRRELEVANT)


def _fits(got: Numbers, wanted: Values) -> bool:
    return all(value is None or value == one for one, value in zip(got, wanted))


def _divides(y: Numbers, x: Numbers) -> bool:
    """Whether a quotient is whole in the small models; in the original it may be rounded, as there."""
    return all(y) and all(p % q == 0 for p, q in zip(x[:2], y[:2]))


def _times(x: Numbers, y: Numbers) -> Numbers:
    return tuple(p * q for p, q in zip(x, y))


def _over(x: Numbers, y: Numbers) -> Numbers:
    return tuple(p // q for p, q in zip(x, y))
