"""Print the oldest version of every package that pyproject.toml allows, as pip constraints.

Only what users install: what is for development (the extras `dev`, `trl`, `bench` and `docs`) comes in its newest
versions.
Needs `packaging`, and `tomli` on Python 3.10; both come with `pip install build`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
TOOLS = ("dev", "trl", "bench", "docs")


def lower_bounds(project: dict[str, Any]) -> list[str]:
    """`name==version` of each requirement of `[project]`, sorted. One without a lower bound is an error."""
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in TOOLS}
    found = {}
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # an extra that takes in another one
            continue
        bounds = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(bounds) != 1:
            raise SystemExit(f"pyproject.toml: {line!r} must have one lower bound (>=)")
        found[requirement.name] = f"{requirement.name}=={bounds[0]}"
    return sorted(found.values())


if __name__ == "__main__":
    print("\n".join(lower_bounds(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])))
