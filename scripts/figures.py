"""Draws the pictures of the documentation: `python -m scripts.figures` writes `docs/images/`.

The intervals in `fused_qkv.svg` come from a compiled plan of this repository and from the interval arithmetic that the
loader uses; nothing in it is placed by hand. `tests/docs/test_figures.py` says when a picture is out of date.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from autotp_plan.planner.pictures.layer_svg import layer_svg
from autotp_plan.planner.pictures.page import page
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.plan.document import Plan

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PLAN = ROOT / "autotp_plan" / "plans" / "phi_3_medium" / "tp2.json"
LAYER_PLAN = ROOT / "autotp_plan" / "plans" / "phi_3_mini" / "tp4.json"
WEIGHT = "model.layers.{0..39}.self_attn.qkv_proj.weight"
HEAD_DIM = 128

LETTERS = ("Q", "K", "V")
WORDS = ("query", "key", "value")
FILL = ("#3f74b5", "#dd8a22", "#3b9468")
INK, SOFT, BAD, GOOD = "#1f2328", "#59636e", "#c1272d", "#1a7f37"
FONT = "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""


class Segment(NamedTuple):
    """Rows `[start, stop)` of sub-parameter `sub` (0, 1, 2 for Q, K, V), at row `at` of a shard."""

    sub: int
    start: int
    stop: int
    at: int


def text(x: float, y: float, words: str, *, size: float = 12, fill: str = INK, anchor: str = "start",
         weight: int = 400) -> str:  # fmt: skip
    """One line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG file on a white card, so that it can be read on a dark page too."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" {FONT}>',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" stroke="#d1d9e0"/>',
            *parts,
            "</svg>\n",
        ]
    )


def sub_parameters(layout: Layout) -> list[iv.Interval]:
    """The rows of Q, K and V in the fused weight."""
    found: list[iv.Interval] = []
    start = 0
    for sub in layout.sub_parameters:
        found.append((start, start + sub.size))
        start += sub.size
    return found


def contents(held: Sequence[iv.Interval], subs: Sequence[iv.Interval]) -> list[Segment]:
    """What a shard that holds the rows `held` consists of, in the order of its rows."""
    found = []
    for number, sub in enumerate(subs):
        for copy in iv.copies(held, (sub,)):
            found.append(Segment(number, copy.target, copy.target + copy.length, copy.source))
    return sorted(found, key=lambda segment: segment.at)


def reads(held: Sequence[iv.Interval], subs: Sequence[iv.Interval], sizes: Sequence[int]) -> list[list[Segment]]:
    """What attention finds where it expects `sizes` rows of Q, then of K, then of V."""
    found = []
    at = 0
    for size in sizes:
        within = []
        for segment in contents(held, subs):
            start = max(segment.at, at)
            stop = min(segment.at + segment.stop - segment.start, at + size)
            if start < stop:
                first = segment.start + start - segment.at
                within.append(Segment(segment.sub, first, first + stop - start, start))
        found.append(within)
        at += size
    return found


def heads(segment: Segment) -> str:
    """`query 0-19`: the heads that a segment is made of."""
    return f"{WORDS[segment.sub]} {segment.start // HEAD_DIM}\u2013{segment.stop // HEAD_DIM - 1}"


def bar(x: float, y: float, height: float, scale: float, segments: Sequence[Segment]) -> list[str]:
    """A shard as a bar: one colour for each of Q, K and V, one line between two heads."""
    parts = []
    for sub, start, stop, at in segments:
        left, width = x + at * scale, (stop - start) * scale
        parts.append(f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{FILL[sub]}"/>')
        for row in range(start, stop, HEAD_DIM):
            line = left + (row - start) * scale
            parts.append(
                f'<path d="M{line:.1f} {y:.1f}v{height:.1f}" stroke="#ffffff" '
                f'stroke-width="{2 if row == start else 0.7}"/>'
            )
        label = LETTERS[sub]
        parts.append(text(left + width / 2, y + height / 2 + 4.5, label, fill="#ffffff", anchor="middle", weight=700))
    return parts


def bracket(x: float, y: float, width: float, colour: str) -> str:
    """The range of rows that attention takes for one of Q, K and V."""
    return f'<path d="M{x + 2:.1f} {y:.1f}v5h{width - 4:.1f}v-5" fill="none" stroke="{colour}" stroke-width="1.4"/>'


def interval_text(intervals: Sequence[iv.Interval]) -> str:
    """`[0, 2560) + [5120, 5760)`."""
    return " + ".join(f"[{start}, {stop})" for start, stop in intervals)


def split(y: float, per_rank: Sequence[Sequence[iv.Interval]], layout: Layout, scale: float) -> list[str]:
    """One way to split the weight: each rank's shard, and what its attention reads from it."""
    subs = sub_parameters(layout)
    parts: list[str] = []
    for rank, held in enumerate(per_rank):
        x = 30 + rank * (iv.length(held) * scale + 24)
        planned = layout.intervals[rank]
        sizes = [sum(copy.length for copy in iv.copies(planned, (sub,))) for sub in subs]
        right = reads(planned, subs, sizes)
        parts.append(text(x, y, f"rank {rank}", weight=600))
        parts.append(text(x + 46, y, f"rows {interval_text(held)}", size=11.5, fill=SOFT))
        parts += bar(x, y + 8, 26, scale, contents(held, subs))
        at = 0
        for number, (size, found) in enumerate(zip(sizes, reads(held, subs, sizes))):
            colour = GOOD if found == right[number] else BAD
            left, width = x + at * scale, size * scale
            parts.append(bracket(left, y + 37, width, colour))
            middle = left + width / 2
            parts.append(text(middle, y + 55, f"read as {LETTERS[number]}", size=11, fill=colour, anchor="middle",
                              weight=600))  # fmt: skip
            parts.append(text(middle, y + 69, " + ".join(map(heads, found)), size=10.5, fill=colour, anchor="middle"))
            at += size
    return parts


def fused_qkv() -> str:
    """A fused `[Q; K; V]` with grouped-query attention over two ranks, split as one matrix and by its plan."""
    plan = Plan.read(PLAN)
    layout = plan.layouts[next(entry.layout for entry in plan.parameters if entry.name == WEIGHT)]
    assert layout.dim is not None
    rows = layout.shape[layout.dim]
    chunks = [(interval,) for interval in iv.divide(rows, plan.tp_size)]
    scale = 836 / rows
    whole = contents(((0, rows),), sub_parameters(layout))
    counts = ", ".join(f"{(s.stop - s.start) // HEAD_DIM} {WORDS[s.sub]} heads" for s in whole)
    parts = [
        text(30, 32, "Phi-3-medium: one fused qkv_proj.weight", size=15, weight=700),
        text(30, 51, f"{rows} rows: {counts}, {HEAD_DIM} rows each", size=12, fill=SOFT),
        *bar(30, 60, 26, scale, whole),
        text(30, 121, "\u2717  Wrong: split as one matrix, in equal chunks", size=14, fill=BAD, weight=700),
        *split(145, chunks, layout, scale),
        text(30, 249, "\u2713  Right: the intervals of the plan", size=14, fill=GOOD, weight=700),
        *split(273, layout.intervals, layout, scale),
        text(30, 372, "Both give each rank a shard of the same shape, so neither raises an error. "
             "The first computes attention from the wrong rows.", size=12, fill=SOFT),
    ]  # fmt: skip
    return document(920, 392, "A fused QKV weight over two tensor-parallel ranks, split wrongly and rightly", parts)


def box(x: float, y: float, width: float, words: Sequence[str], *, fill: str = "#f6f8fa", stroke: str = "#8c959f",
        height: float = 44) -> list[str]:  # fmt: skip
    """A box with one line of bold text and lines of small text below it."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>',
        text(x + width / 2, y + (27 if len(words) == 1 else 19), words[0], size=12.5, anchor="middle", weight=600),
    ]
    for number, line in enumerate(words[1:]):
        parts.append(text(x + width / 2, y + 35 + 14 * number, line, size=10.5, fill=SOFT, anchor="middle"))
    return parts


def arrow(
    points: Sequence[tuple[float, float]], label: str = "", *, at: tuple[float, float] | None = None
) -> list[str]:
    """An arrow along `points`; `label` is a command or a call."""
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    parts = [f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#tip)"/>']
    if label:
        (x0, y0), (x1, y1) = points[0], points[-1]
        x, y = at or ((x0 + x1) / 2, (y0 + y1) / 2 - 6)
        parts.append(
            f'<text x="{x}" y="{y}" font-size="11.5" fill="#0550ae" text-anchor="middle" '
            f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">{escape(label)}</text>'
        )
    return parts


def flow() -> str:
    """From a checkpoint to a plan, to shards, to a training job and back."""
    data, tool = "#ddf4ff", "#54aeff"
    parts = [
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
        '<rect x="16" y="16" width="888" height="262" rx="8" fill="#fbfcfd" stroke="#d1d9e0" stroke-dasharray="5 4"/>',
        text(30, 38, "Planner: offline, one process, no GPU; torch only for verify", size=13, weight=700),
        '<rect x="16" y="296" width="888" height="150" rx="8" fill="#fbfcfd" stroke="#d1d9e0" stroke-dasharray="5 4"/>',
        text(30, 318, "Runtime: the training job, one process per rank", size=13, weight=700),
        *box(34, 60, 168, ("preset", "one JSON file per architecture")),
        *box(34, 118, 168, ("spec file", "--spec: rules of your own")),
        *box(34, 176, 168, ("DeepSpeed config", "--ds-config: tensor_parallel")),
        *arrow(((202, 82), (262, 128))),
        *arrow(((202, 140), (262, 140))),
        *arrow(((202, 198), (262, 152))),
        *box(266, 112, 120, ("rules", "first match decides"), fill="#fff8c5", stroke="#d4a72c", height=56),
        *box(266, 212, 176, ("checkpoint or config", "compile reads file headers only"), fill=data, stroke=tool),
        *arrow(((326, 212), (326, 172))),
        *arrow(((386, 140), (486, 140)), "compile"),
        *box(490, 118, 118, ("plan.json", "layouts, reviewable"), fill=data, stroke=tool),
        *box(676, 60, 206, ("a table, a list of faults, a proof",
                            "verify: against the dense model"), height=44),
        *arrow(((608, 130), (640, 130), (640, 82), (672, 82)), "show, check, verify", at=(752, 50)),
        *arrow(((549, 162), (549, 222))),
        *arrow(((442, 226), (672, 226)), "presplit", at=(612, 219)),
        *arrow(((676, 244), (446, 244)), "merge", at=(559, 260)),
        *box(676, 212, 206, ("shards/", "each rank's bytes, a manifest"), fill=data, stroke=tool),
        *arrow(((779, 256), (779, 340)), "load_model", at=(824, 316)),
        *box(700, 344, 158, ("model", "this rank's shard only"), fill=data, stroke=tool),
        *arrow(((700, 366), (602, 366)), "initialize", at=(652, 358)),
        *box(440, 344, 158, ("DeepSpeed engine", "ZeRO 0 to 3, TP x DP"), fill="#fff8c5", stroke="#d4a72c"),
        *arrow(((440, 366), (332, 366)), "save_checkpoint", at=(386, 358)),
        *box(170, 344, 158, ("job/", "resume, also on another mesh"), fill=data, stroke=tool),
        *arrow(((519, 388), (519, 420), (894, 420), (894, 234), (886, 234)), "save_shards", at=(700, 413)),
    ]  # fmt: skip
    return document(920, 462, "From a checkpoint to a plan, to shards, to a training job, and back", parts)


def layer() -> str:
    """What `autotp-plan show --svg` draws of a model with fused weights."""
    return layer_svg(Plan.read(LAYER_PLAN))


FIGURES = {"fused_qkv.svg": fused_qkv, "flow.svg": flow, "layer.svg": layer}
SCREENSHOTS = {"page.png": ROOT / "autotp_plan" / "plans" / "deepseek_v3" / "tp8.json"}
"""Pictures of pages of `autotp-plan show --html`, taken where chromium is installed."""


def screenshot(plan: Path, target: Path) -> None:
    """Write what chromium shows of the page of a plan, 1280 pixels wide."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "page.html"
        page_file.write_text(page(Plan.read(plan)), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,1700"]
        command = [chromium, *options, f"--user-data-dir={folder}", f"--screenshot={target}", page_file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
    for name, plan in SCREENSHOTS.items():
        screenshot(plan, IMAGES / name)


if __name__ == "__main__":
    main()
