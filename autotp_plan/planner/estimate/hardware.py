"""What a GPU and its links do in a second: figures in a JSON file that one can read, copy and change."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import Fault, OptionError

FILE = Path(__file__).with_name("hardware.json")
"""The figures that are there by name."""
_SHARES = ("efficiency", "link_efficiency")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A GPU and its links, as `hardware.json` has them.

    Attributes:
        name: what it is.
        operations_per_s: floating-point operations of dense bf16 products that it is specified for.
        efficiency: share of them that a training step reaches.
        memory_bytes_per_s: that it reads or writes.
        inside_node_bytes_per_s: that a GPU sends to others of its node, while it receives as many.
        between_nodes_bytes_per_s: the same to other nodes, for each GPU.
        link_efficiency: share of both that collectives reach.
        inside_node_latency_s: of a collective inside of a node.
        between_nodes_latency_s: of a collective between nodes.
        notes: where each figure is from.
    """

    name: str
    operations_per_s: float
    efficiency: float
    memory_bytes_per_s: float
    inside_node_bytes_per_s: float
    between_nodes_bytes_per_s: float
    link_efficiency: float
    inside_node_latency_s: float
    between_nodes_latency_s: float
    notes: dict[str, str] = field(default_factory=dict)


def read_hardware(given: str, where: str = "--hardware") -> Hardware:
    """The figures of a GPU.

    Args:
        given: a name in `hardware.json`, or a file of the same form: the only one in it, or `FILE:NAME`.
        where: the option that says it.

    Raises:
        OptionError: there is no such name, or a figure is missing, unknown, or no number.
        DocumentError: the file is not JSON.
    """
    known = _entries(FILE)
    if given in known:
        return _hardware(given, known[given], FILE)
    file, name = Path(given), ""
    if not file.exists() and ":" in given:
        before, _, name = given.rpartition(":")
        file = Path(before)
    if not file.is_file():
        raise OptionError(_fault(where, given, f"{', '.join(known)}, or a file", f"copy and change {FILE}"))
    entries = _entries(file)
    if name not in entries and (name or len(entries) != 1):
        names = ", ".join(f"{file}:{one}" for one in entries) or "a file with a GPU in it"
        raise OptionError(_fault(where, given, names, "say which one"))
    name = name or next(iter(entries))
    return _hardware(name, entries[name], file)


def _entries(path: Path) -> dict[str, Any]:
    found = documents.read_json(path, "hardware")
    if isinstance(found, dict):
        return found
    raise OptionError(_fault(str(path), type(found).__name__, "an object with a GPU by its name", f"copy {FILE}"))


def _hardware(name: str, entry: Any, file: Path) -> Hardware:
    if not isinstance(entry, dict):
        raise OptionError(_fault(f"{name} in {file}", type(entry).__name__, "an object", f"copy one of {FILE}"))
    figures = [one.name for one in dataclasses.fields(Hardware) if one.name not in ("name", "notes")]
    faults = [
        _fault(f"{name}.{key} in {file}", "nothing of the kind is known", f"only {', '.join(figures)}", "remove it")
        for key in sorted(entry.keys() - {*figures, "name", "notes"})
    ]
    for key in figures:
        value = entry.get(key)
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if not right or (key in _SHARES and float(entry[key]) > 1):
            expected = "a number above 0" + (", at most 1" if key in _SHARES else "")
            faults.append(_fault(f"{name}.{key} in {file}", repr(value)[:80], expected, "give the figure"))
    for key, kind in (("name", str), ("notes", dict)):
        if not isinstance(entry.get(key, kind()), kind):
            faults.append(_fault(f"{name}.{key} in {file}", repr(entry[key])[:80], kind.__name__, "correct it"))
    if faults:
        raise OptionError(faults)
    numbers = {key: float(entry[key]) for key in figures}
    return Hardware(name=entry.get("name", name), notes=entry.get("notes", {}), **numbers)


def _fault(where: str, got: str, expected: str, next_step: str) -> Fault:
    return Fault(
        code="hardware",
        what="these are no figures of a GPU",
        where=where,
        got=got,
        expected=expected,
        next=next_step,
    )
