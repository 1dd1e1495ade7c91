"""What an architecture's tensors are called on disk, and what its module parameters are called in memory.

Names in rules have `*` for each number. This module knows names only: no shapes, no files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from autotp_plan.schemas.names import NameSet, is_index, starred
from autotp_plan.schemas.plan.entries import Sources

_T = TypeVar("_T")
_HEAD = "lm_head."
"""Beginning of the names that never have a base model's prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskNames:
    """How an architecture's tensors on disk differ from its module parameters.

    `renamed` maps disk to module names, `assembled` a module name to those on disk that it is made of; `ignored` are
    names (with braces) of tensors that are no parameters; `tied` maps a second name to the parameter it is. Where no
    name on disk begins with `base_model_prefix`, all but the head's lack it. `renamed_prefixes` maps the beginning of
    names on disk to that of module names, before all else; a name that has the beginning of a module name stays.
    `transposed` maps names of parameters that may be transposed on disk to their shapes as the module has them.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    assembled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    base_model_prefix: str | None = None
    renamed_prefixes: Mapping[str, str] = field(default_factory=dict)
    transposed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def is_transposed(self, parameter: str, on_disk: Sequence[int]) -> bool | None:
        """Whether the tensor of a parameter has its last two dimensions exchanged on disk, where it has that shape.

        Returns:
            None where the shape is neither the parameter's nor that with dimensions exchanged.
        """
        wanted = self.transposed.get(starred(parameter)) if self.transposed else None
        if wanted is None or _fits(on_disk, wanted):
            return False
        return True if _fits((*on_disk[:-2], *on_disk[:-3:-1]), wanted) else None


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(size in (-1, found) for size, found in zip(wanted, shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskTensor:
    """What a tensor on disk is: a parameter, or the one of its `sources` at `position`, with its `number`.

    `stack` is the same for all tensors that are numbered together: those of all experts of all layers.
    """

    parameter: str
    sources: Sources | None = None
    position: int = 0
    number: int = 0
    stack: str = ""


class ToMemory:
    """From names on disk to parameters, for a checkpoint that holds the names `on_disk`."""

    def __init__(self, names: DiskNames, on_disk: Collection[str]) -> None:
        self._tied = names.tied
        self._renamed = _Patterns(names.renamed.items())
        self._assembled = _Patterns(
            (disk, (memory, disks, position))
            for memory, disks in names.assembled.items()
            for position, disk in enumerate(disks)
        )
        prefix = f"{names.base_model_prefix}." if names.base_model_prefix else ""
        self._missing = "" if any(name.startswith(prefix) for name in on_disk) else prefix
        self._ignored = NameSet(names.ignored)
        kept = {module: module for module in names.renamed_prefixes.values()}
        self._prefixes = sorted({**kept, **names.renamed_prefixes}.items(), key=lambda pair: -len(pair[0]))

    def role(self, disk: str) -> DiskTensor | None:
        """What the tensor with the name `disk` is.

        Returns:
            None for a tensor that is no parameter, and is ignored.
        """
        before, after = next(((old, new) for old, new in self._prefixes if disk.startswith(old)), ("", ""))
        prefixed = after + disk.removeprefix(before)
        if self._missing and not self._is_named(prefixed):
            prefixed = self._missing + prefixed
        if disk in self._ignored or prefixed in self._ignored:
            return None
        found = self._assembled.find(prefixed)
        if found is None:
            renamed = self._renamed.find(prefixed)
            return DiskTensor(parameter=prefixed if renamed is None else _fill(*renamed))
        (memory, disks, position), numbers = found
        stacked = len(numbers) > memory.count("*")
        shared = numbers[:-1] if stacked else numbers
        names = [_fill(pattern, shared) for pattern in disks]
        if prefixed != disk:
            names = [name.removeprefix(self._missing) for name in names]
            names = [before + name.removeprefix(after) if name.startswith(after) else name for name in names]
        return DiskTensor(
            parameter=_fill(memory, shared),
            sources=Sources(names=tuple(names)),
            position=position,
            number=int(numbers[-1]) if stacked else 0,
            stack=disks[position].rpartition("*")[0] if stacked else "",
        )

    def _is_named(self, disk: str) -> bool:
        """Whether a name without the prefix means something as it is."""
        if disk.startswith(_HEAD) or disk in self._tied:
            return True
        return bool(self._renamed.find(disk) or self._assembled.find(disk))


class ToDisk:
    """From parameters to names on disk, as transformers writes them."""

    def __init__(self, names: DiskNames) -> None:
        self._renamed = _Patterns((memory, disk) for disk, memory in names.renamed.items())
        self._assembled = _Patterns(names.assembled.items())
        first: dict[str, str] = {}
        for disk, module in names.renamed_prefixes.items():
            first.setdefault(module, disk)
        self._prefixes = sorted(first.items(), key=lambda pair: -len(pair[0]))

    def source(self, parameter: str) -> str | None:
        """The name on disk of a parameter that is one tensor there; None when it is the parameter's name."""
        found = self._renamed.find(parameter)
        name = self._on_disk(parameter if found is None else _fill(*found))
        return None if name == parameter else name

    def sources(self, parameter: str, shape: Sequence[int]) -> Sources | None:
        """The names on disk of a parameter of `shape` that is several tensors there; None when it is one."""
        found = self._assembled.find(parameter)
        if found is None:
            return None
        disks, numbers = found
        stacked = disks[0].count("*") > len(numbers)
        names = tuple(self._on_disk(_fill(disk, numbers)) for disk in disks)
        return Sources(names=names, count=shape[0] if stacked and shape else 1)

    def _on_disk(self, name: str) -> str:
        """The name with the beginning that it has on disk: the first that is listed for it."""
        module, disk = next(((new, old) for new, old in self._prefixes if name.startswith(new)), ("", ""))
        return disk + name.removeprefix(module)


class _Pattern(NamedTuple, Generic[_T]):
    """Which components of a name are which numbers, which may be any, and what the name means."""

    numbers: list[tuple[int, str]]
    stars: list[int]
    value: _T


class _Patterns(Generic[_T]):
    """What is meant by a name, by patterns in which `*` is any number. A pattern with fewer `*` comes first."""

    def __init__(self, entries: Iterable[tuple[str, _T]]) -> None:
        self._by_template: dict[str, list[_Pattern[_T]]] = {}
        for pattern, value in sorted(entries, key=lambda entry: entry[0].count("*")):
            parts = pattern.split(".")
            numbers = [(place, part) for place, part in enumerate(parts) if is_index(part)]
            stars = [place for place, part in enumerate(parts) if part == "*"]
            self._by_template.setdefault(starred(pattern), []).append(_Pattern(numbers, stars, value))

    def find(self, name: str) -> tuple[_T, list[str]] | None:
        """The value of the first pattern that `name` matches, and the numbers in place of its `*`."""
        if not self._by_template:
            return None
        patterns = self._by_template.get(starred(name))
        if patterns is None:
            return None
        parts = name.split(".")
        for numbers, stars, value in patterns:
            if all(parts[place] == number for place, number in numbers):
                return value, [parts[place] for place in stars]
        return None


def _fill(pattern: str, numbers: Sequence[str]) -> str:
    """The pattern with its first `*`s replaced by `numbers`; what is left of them stays."""
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern
