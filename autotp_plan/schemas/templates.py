"""Names without the numbers of layers: what is one rule in a spec file.

Numbers that count layers or experts become `*`. Those that tell apart what is different in one layer
(`ffn.0.weight` and `ffn.2.weight` of a sequence) stay.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from autotp_plan.schemas.names import is_index, starred


class Templates:
    """The templates of a model's names.

    Where layers hold modules of several classes under one name (a mixer, or an attention), and these have parameters of
    the same name, the numbers of the layers stay: `layers.<0|2>.mixer`.

    Args:
        shapes: of all its parameters, by name.
        classes: the class of each of its modules, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], classes: Mapping[str, str] | None = None) -> None:
        kinds: dict[str, dict[str, set[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(set))
        for name, shape in shapes.items():
            kinds[starred(name)][_first_only(name)].add(shape)
        different = {
            name
            for by_first in kinds.values()
            if len(by_first) > 1 and len({tuple(sorted(found)) for found in by_first.values()}) > 1
            for name in by_first
        }
        self._modules = {name.rpartition(".")[0] for name in different}
        self._classes = dict(classes or {})
        self._layers: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for module, kind in self._classes.items():
            number = _number(module)
            if number is not None:
                self._layers[_first_only(module), kind].append(number)
        for name in [*shapes, *self._classes]:
            for module in _around(name):
                if module in self._classes:
                    self._owners[_first_only(name)].add((_first_only(module), self._classes[module]))

    def __call__(self, name: str) -> str:
        """The template of a parameter's or a module's name."""
        first = _first_only(name)
        inside = any(f"{first}.".startswith(f"{module}.") for module in self._modules)
        found = first if inside else starred(name)
        layers = self._layers_of(name)
        return found if layers is None else found.replace("*", f"<{'|'.join(layers)}>", 1)

    def _layers_of(self, name: str) -> list[str] | None:
        """The layers in which a name is of the same kind as in this one, where not in all."""
        owners = self._owners[_first_only(name)]
        for module in _around(name):
            first = _first_only(module)
            if module in self._classes and len({kind for other, kind in owners if other == first}) > 1:
                return self._layers[first, self._classes[module]]
        return None


def pattern_of(template: str) -> str:
    """A regular expression for the names of a template."""
    escaped = re.escape(template).replace(r"\*", r"\d+")
    return re.sub(r"<([\d\\|]+)>", lambda found: f"({found[1].replace(chr(92), '')})", escaped) + "$"


def _number(name: str) -> str | None:
    return next((part for part in name.split(".") if is_index(part)), None)


def _around(name: str) -> Iterator[str]:
    """The modules in a layer that a name is in, itself too: `layers.0.mixer` of `layers.0.mixer.norm.weight`."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if is_index(part)), len(parts))
    for count in range(at + 2, len(parts) + 1):
        yield ".".join(parts[:count])


def _first_only(name: str) -> str:
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if is_index(part)), None)
    return name if at is None else ".".join([*parts[:at], "*", *parts[at + 1 :]])
