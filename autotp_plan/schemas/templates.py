"""Names without the numbers of layers: what is one rule in a spec file.

Numbers that count layers or experts become `*`. Those that tell apart what is different in one layer
(`ffn.0.weight` and `ffn.2.weight` of a sequence) stay.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from autotp_plan.schemas.names import is_index, starred


class Templates:
    """The templates of a model's names.

    Args:
        shapes: of all its parameters, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
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

    def __call__(self, name: str) -> str:
        """The template of a parameter's or a module's name."""
        first = _first_only(name)
        inside = any(f"{first}.".startswith(f"{module}.") for module in self._modules)
        return first if inside else starred(name)


def pattern_of(template: str) -> str:
    """A regular expression for the names of a template."""
    return re.escape(template).replace(r"\*", r"\d+") + "$"


def _first_only(name: str) -> str:
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if is_index(part)), None)
    return name if at is None else ".".join([*parts[:at], "*", *parts[at + 1 :]])
