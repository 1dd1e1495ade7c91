"""docs/scale.md and its charts are what `python -m benchmarks.scale` writes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks.scale import BASE, FAMILIES, Setting, sweeps
from benchmarks.scale_report import page, rows, write
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
REPORT: dict[str, Any] = json.loads((DOCS / "scale.json").read_text())


def test_the_page_is_what_the_program_writes(tmp_path: Any) -> None:
    write(REPORT, tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["scale-llama.svg", "scale-moe.svg", "scale.json", "scale.md"]
    for name in written:
        assert (DOCS / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8"), (
            "run `python -m benchmarks.scale --again`"
        )


def test_every_setting_of_the_program_is_on_the_page() -> None:
    assert REPORT["models"] == {key: family.name for key, family in FAMILIES.items()}
    for family, base in BASE.items():
        for sweep, settings in sweeps(base).items():
            assert [Setting(**one) for one in REPORT["sweeps"][family][sweep]] == settings
            assert len(rows(REPORT, family, sweep)) == len(settings)


@pytest.mark.parametrize("name", ["forward_operations", "kept", "collectives"])
def test_figures_that_do_not_fit_the_sentences_are_refused(name: str) -> None:
    planted = copy.deepcopy(REPORT)
    (cell,) = [one for one in planted["cells"] if one["setting"]["layers"] == 2 * BASE["llama"].layers]
    cell["figures"][name] *= 1.01
    with pytest.raises(AssertionError, match=name):
        page(planted)
