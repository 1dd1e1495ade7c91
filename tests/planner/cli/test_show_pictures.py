"""`show --html`, `--svg` and `--estimate` on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from autotp_plan.planner.cli.main import main
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.paths import PLANS

PLAN = PLANS / "llama_3_1_8b" / "tp4.json"


def test_a_page_and_a_picture_are_written(tmp_path: Path) -> None:
    page, svg = tmp_path / "report.html", tmp_path / "layer.svg"
    done = CliRunner().invoke(main, ["show", str(PLAN), "--html", str(page), "--svg", str(svg)])
    assert done.exit_code == 0, done.output
    assert done.output == f"{page}: a page that needs no network\n{svg}: one layer\n"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert svg.read_text(encoding="utf-8").startswith("<svg ")


def test_they_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    pages = []
    for seed in ("1", "2"):
        code = "from autotp_plan.planner.cli.main import main; main()"
        options = ["show", str(PLAN), "--html", str(tmp_path / seed), "--svg", str(tmp_path / f"{seed}.svg")]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", code, *options], env=environment, check=True, capture_output=True)
        pages.append((tmp_path / seed).read_bytes() + (tmp_path / f"{seed}.svg").read_bytes())
    assert pages[0] == pages[1]


def test_a_page_on_standard_output(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["show", str(PLAN), "--html", "-"])
    assert done.exit_code == 0 and done.stdout.startswith("<!DOCTYPE html>") and done.stdout.endswith("</html>\n")
    assert "a page that needs no network" in done.stderr


def test_an_estimate_needs_a_page_and_is_of_this_plan(tmp_path: Path) -> None:
    path, page = tmp_path / "estimate.json", tmp_path / "report.html"
    fingerprint = Plan.read(PLAN).fingerprint
    rank = {"tp_ranks": [0, 1, 2, 3], "peak": 3, "at_peak": [{"what": "weights", "bytes": 3}]}
    path.write_text(json.dumps({"plan": fingerprint, "settings": {}, "measured": True, "ranks": [rank]}))
    done = CliRunner().invoke(main, ["show", str(PLAN), "--estimate", str(path)])
    assert done.exit_code == 2 and "add --html report.html" in done.stderr
    done = CliRunner().invoke(main, ["show", str(PLAN), "--estimate", str(path), "--html", str(page)])
    assert done.exit_code == 0 and "What a training step takes" in page.read_text()
    other = PLANS / "llama_3_1_8b" / "tp2.json"
    done = CliRunner().invoke(
        main, ["show", str(other), "--estimate", str(path), "--html", str(tmp_path / "other.html")]
    )
    assert done.exit_code == 2 and "the estimate is of another plan" in done.stderr
    assert not (tmp_path / "other.html").exists()
    done = CliRunner().invoke(main, ["show", str(PLAN), "--estimate", str(tmp_path / "no"), "--html", str(page)])
    assert done.exit_code == 2 and "cannot read the estimate" in done.stderr


def test_an_estimate_of_another_plan_is_made_anew_as_the_error_says(tmp_path: Path) -> None:
    path, page = tmp_path / "estimate.json", tmp_path / "report.html"
    show = ["show", str(PLAN), "--html", str(page), "--estimate", str(path)]
    for plan, wanted in ((PLANS / "llama_3_1_8b" / "tp2.json", 2), (PLAN, 0)):
        made = CliRunner().invoke(main, ["estimate", str(plan), "--no-run", "--memory", "80GB", "--format", "json"])
        assert made.exit_code in (0, 1), made.output
        path.write_text(made.stdout)
        done = CliRunner().invoke(main, show)
        assert done.exit_code == wanted, done.output
        assert ("run `autotp-plan estimate --format json` with this plan" in done.stderr) == (wanted == 2)
    assert "the memory of a device" in page.read_text(encoding="utf-8")
