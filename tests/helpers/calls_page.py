"""The rows of docs/calls.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "calls.md"

RIGHT = ("Right as it is", "Right by autotp-plan")
REFUSED = "Refused"
PART = "Of this rank's part"
NO_WEIGHTS = "Touches no weights"
GROUPS = (*RIGHT, REFUSED, PART, NO_WEIGHTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        section: the heading above, such as `DeepSpeedEngine`.
        group: one of `GROUPS`.
        calls: the names of the methods, properties or functions.
        what: what happens.
        tests: `file::function`, relative to tests/.
    """

    section: str
    group: str
    calls: tuple[str, ...]
    what: str
    tests: tuple[str, ...]


def rows(text: str | None = None) -> list[Row]:
    """Every row of the page."""
    found: list[Row] = []
    section = group = ""
    for line in (PAGE.read_text(encoding="utf-8") if text is None else text).splitlines():
        if line.startswith("## "):
            section, group = line[3:].strip("` "), ""
        elif line.startswith("### "):
            group = line[4:].strip()
        elif line.startswith("| `"):
            call, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            found.append(
                Row(
                    section=section,
                    group=group,
                    calls=tuple(re.findall(r"`([^`]+)`", call)),
                    what=cells[0].strip("| "),
                    tests=tuple(re.findall(r"`([^`]+)`", cells[1])) if len(cells) > 1 else (),
                )
            )
    return found


def group_of(section: str) -> dict[str, str]:
    """By call the group that it is listed in."""
    return {call: row.group for row in rows() if row.section == section for call in row.calls}
