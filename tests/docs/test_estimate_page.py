"""The table of docs/estimate.md is that of the figures beside it, and they hold what the page says of them."""

from __future__ import annotations

import json

from benchmarks.estimates import RUNS, verdict, with_table
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "estimate.md"
DOCUMENT = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_table_is_of_the_figures() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, DOCUMENT) == page, "run `python -m benchmarks.estimates --page docs/estimate.md`"
    assert verdict(DOCUMENT) in page
    planted = {**DOCUMENT, "runs": [{**DOCUMENT["runs"][0], "measured": 1}, *DOCUMENT["runs"][1:]]}
    assert with_table(page, planted) != page


def test_every_run_is_within_the_goal() -> None:
    assert [row["name"] for row in DOCUMENT["runs"]] == [one.name for one in RUNS]
    errors = sorted(abs(row["error"]) for row in DOCUMENT["runs"])
    assert errors[-1] <= 0.1 and errors[len(errors) // 2] <= 0.05
