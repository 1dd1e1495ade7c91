"""Collecting the faults of one compile or check, and telling the same mistake of many layers once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from autotp_plan.schemas.errors import AutoTPError, Fault
from autotp_plan.schemas.names import expand, fold, starred


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """A fault without numbers of layers. `got` has a `\\0` and a number for each name of `mentions` (with `*`)."""

    code: str
    what: str
    rule: str
    got: str
    expected: str
    next: str
    mentions: tuple[str, ...]


@dataclass
class FaultBook:
    """Faults by everything but names, so that 32 layers with one mistake are one fault."""

    _found: dict[_Kind, dict[str, Sequence[str]]] = field(default_factory=lambda: defaultdict(dict))

    def add(
        self,
        code: str,
        what: str,
        name: str = "",
        rule: object = "",
        *,
        got: str = "",
        expected: str = "",
        next: str = "",
        mentions: Sequence[str] = (),
    ) -> None:
        """Note a fault.

        Args:
            code: the kind of fault in short, as in `Fault.code`.
            what: the kind of fault in words.
            name: the parameter or tensor that is wrong; empty for a fault of the rule itself.
            rule: the rule that decided, or that is wrong; printed with `str`.
            got: what was found.
            expected: what would be right.
            next: the next step.
            mentions: names of other parameters that stand in `got`, and differ between layers as `name` does.
        """
        for place, mentioned in sorted(enumerate(mentions), key=lambda one: -len(one[1])):
            got = got.replace(mentioned, f"\0{place}")
        templates = tuple(map(starred, mentions))
        kind = _Kind(code=code, what=what, rule=str(rule), got=got, expected=expected, next=next, mentions=templates)
        self._found[kind].setdefault(name, mentions)

    def __bool__(self) -> bool:
        return bool(self._found)

    def faults(self) -> list[Fault]:
        """Every fault; those that differ only in the layer are one: `model.layers.{0..31}.mlp.up_proj.weight`."""
        return [
            Fault(code=kind.code, what=kind.what, where=where, got=got, expected=kind.expected, next=kind.next)
            for kind, names in self._found.items()
            for where, got in _folded(kind, names)
        ]

    def raise_if_any(self, error: type[AutoTPError]) -> None:
        """Raise `error` with all faults, when there are any."""
        if self:
            raise error(self.faults())


def _folded(kind: _Kind, names: dict[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """`where` and `got` of each fault that the faults at `names` fold into."""
    rule = f" ({kind.rule})" if kind.rule else ""
    mentions = any(names.values())
    for pattern in fold(names):
        got = kind.got
        if mentions:
            for place, column in enumerate(zip(*(names[name] for name in expand(pattern)))):
                got = got.replace(f"\0{place}", ", ".join(fold(dict.fromkeys(column))))
        yield f"{pattern}{rule}" if pattern else kind.rule, got
