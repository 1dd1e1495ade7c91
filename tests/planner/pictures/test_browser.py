"""The page in a real browser: wide and narrow, light and dark, printed, searched, and with names that attack it."""

from __future__ import annotations

import dataclasses
import re
import zlib
from pathlib import Path

import pytest

from autotp_plan.planner.pictures.page import page
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.browser import ask, needs_chromium, run
from tests.helpers.paths import PLANS
from tests.planner.pictures.plans import HOSTILE, plan

pytestmark = needs_chromium


def written(folder: Path, one: Plan) -> Path:
    path = folder / "page.html"
    path.write_text(page(one), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("qwen2_5_vl_7b/tp4", 390, True), ("deepseek_v3/tp16", 1280, False)]
)
def test_nothing_is_wider_than_the_screen_and_colours_follow_the_theme(
    tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    path = written(tmp_path, Plan.read(PLANS / f"{name}.json"))
    question = """({
      inner: innerWidth,
      wide: document.documentElement.scrollWidth,
      over: [...document.querySelectorAll("main *, header *")].filter(
        (one) => one.getBoundingClientRect().right > innerWidth && !one.closest(".scroll")
      ).map((one) => one.outerHTML.slice(0, 120)).slice(0, 5),
      paper: getComputedStyle(document.body).backgroundColor,
      ink: getComputedStyle(document.body).color,
      other: (document.getElementById("theme").click(), getComputedStyle(document.body).backgroundColor),
      rank: getComputedStyle(document.querySelector(".r0")).fill,
      pieces: document.querySelectorAll("svg.pieces path").length,
      empty: [...document.querySelectorAll("svg.weight")].filter((one) => !one.getBoundingClientRect().width).length,
      area: [...document.querySelectorAll("figure")].slice(0, 1).map((figure) =>
        [...figure.querySelectorAll("svg.pieces path")].map((one) => one.getBoundingClientRect().width)),
    })"""
    found = ask(path, question, width=width, dark=dark)
    assert found["inner"] == width and found["wide"] <= width, found["over"]
    paper, ink, other = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("paper", "ink", "other"))
    assert (paper < 150 and ink > 600 and other > 700) if dark else (paper > 700 and ink < 150 and other < 150)
    assert found["rank"] == ("rgb(34, 105, 114)" if dark else "rgb(76, 62, 160)")
    assert found["pieces"] > 30 and found["empty"] == 0
    if name == "deepseek_v3/tp16":
        (parts,) = found["area"]
        assert len(parts) == 16 and max(parts) - min(parts) < 1.5, "the embedding: sixteen parts of one width"


def test_a_layer_that_is_folded_is_found_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path, Plan.read(PLANS / "deepseek_v3" / "tp8.json"))
    question = """((queries) => queries.map((query) => {
      const field = document.getElementById("search");
      field.value = query;
      field.dispatchEvent(new Event("input"));
      const rows = [...document.querySelectorAll("tr[data-name]:not(.faded)")].map((row) => row.dataset.name);
      const hits = document.querySelectorAll("figure.hit").length;
      return [rows, hits, document.getElementById("found").textContent];
    }))(["layers.2.mlp", "layers.3.mlp.gate", "layers.61.", "O_PROJ", "", "layers.{0..2}.mlp.up", "experts.9"])"""
    dense, gate, none, output, everything, literal, absent = ask(path, question)
    assert dense[0] == [f"model.layers.{{0..2}}.mlp.{one}_proj.weight" for one in ("down", "gate", "up")]
    assert dense[1] == 3 and dense[2] == "3 of the table's rows"
    assert gate[0] == [f"model.layers.{{3..60}}.mlp.gate.{one}" for one in ("e_score_correction_bias", "weight")]
    assert none[0] == [] and absent[0] == []
    assert output[0] == ["model.layers.{0..60}.self_attn.o_proj.weight"] and output[1] == 2
    assert len(everything[0]) == len(Plan.read(PLANS / "deepseek_v3" / "tp8.json").parameters) and everything[1] == 0
    assert literal[0] == ["model.layers.{0..2}.mlp.up_proj.weight"]


def test_a_script_in_a_name_does_not_run_and_ours_does(tmp_path: Path) -> None:
    names = tuple(f"model.layers.0.{name}.weight" for name in HOSTILE) + HOSTILE
    hostile = dataclasses.replace(
        plan(tuple(sorted(set(names))), architecture=HOSTILE[0], rule=HOSTILE[1]), notes=HOSTILE
    )
    dom = run(written(tmp_path, hostile), "--dump-dom")
    assert "data-pwned" not in dom.split(">", 2)[1]
    assert 'class="tools js"' in dom and 'class="tools js" hidden' not in dom, (
        "the policy lets the page's own script run"
    )
    assert len(re.findall("<script", dom)) == 1
    attacked = tmp_path / "attacked.html"
    text = page(hostile).replace("<main>", "<main><script>document.documentElement.dataset.pwned = 1</script>", 1)
    attacked.write_text(text, encoding="utf-8")
    assert "data-pwned" not in run(attacked, "--dump-dom").split(">", 2)[1], "and no other, wherever it came from"
    attacked.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text), encoding="utf-8")
    assert "data-pwned" in run(attacked, "--dump-dom").split(">", 2)[1], "without the policy this check would see it"


def test_it_is_printed_light_on_a_few_pages(tmp_path: Path) -> None:
    path = written(tmp_path, Plan.read(PLANS / "phi_3_mini" / "tp4.json"))
    run(path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", dark=True)
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8
    colours = set()
    for found in re.findall(rb"stream\r?\n(x.*?)endstream", pdf, re.DOTALL):
        text = zlib.decompressobj().decompress(found)
        for match in re.finditer(rb"([\d.]+) ([\d.]+) ([\d.]+) rg\b", text):
            colours.add(tuple(round(255 * float(part)) for part in match.groups()))
    assert {(34, 105, 114), (28, 33, 39)} <= colours, "the colour of rank 0, and the ink of the light page"
    assert not {(20, 23, 27), (28, 32, 37), (233, 231, 226)} & colours, "nothing of the dark page"
