"""Collecting the faults of one compile or check: alike ones of many layers become one."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from autotp_plan.schemas.errors import AutoTPError, Fault
from autotp_plan.schemas.names import fold

_NAME_AND_RULE = re.compile(r"(?P<name>[^ ]+)(?P<rule> \(.*\))?")


@dataclass
class FaultBook:
    """Faults by everything but the parameter's name, so that 32 layers with one mistake are one fault."""

    _found: dict[tuple[str, str, str, str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, what: str, where: str, *, got: str = "", expected: str = "", next: str = "") -> None:
        """Note a fault at `where`: a parameter's name, alone or followed by ` (rule)`, or a rule's name."""
        match = _NAME_AND_RULE.fullmatch(where)
        name, rule = (match["name"], match["rule"] or "") if match else (where, "")
        self._found[what, rule, got, expected, next].append(name)

    def __bool__(self) -> bool:
        return bool(self._found)

    def faults(self) -> list[Fault]:
        """Every fault, alike ones folded."""
        return [
            Fault(what=what, where=f"{name}{rule}", got=got, expected=expected, next=next_step)
            for (what, rule, got, expected, next_step), names in self._found.items()
            for name in fold(dict.fromkeys(names))
        ]

    def raise_if_any(self, error: type[AutoTPError]) -> None:
        """Raise `error` with all faults, when there are any."""
        if self:
            raise error(self.faults())
