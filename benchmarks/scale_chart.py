"""The charts of `benchmarks.scale`: one panel for each setting, both axes by the base and in powers of two."""

from __future__ import annotations

import math
from typing import Any

from scripts.figures import SOFT, document, text

LINES = {
    # figure: words, colour, width: where lines coincide, the next one lies on a broader one
    "weights": ("weights", "#0072b2", 7.0),
    "kept": ("kept for the backward", "#e69f00", 5.0),
    "forward_operations": ("forward operations", "#009e73", 3.4),
    "collective_bytes": ("bytes all-reduced", "#d55e00", 1.8),
    "peak": ("peak", "#1f2328", 1.0),
}
PANELS = {
    "tp": "TP", "dp": "DP", "layers": "layers", "width": "width", "experts": "experts", "length": "sequence length",
    "micro_batch": "micro-batch",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, GAP_X, GAP_Y = 232, 170, 62, 96, 66, 62
COLUMNS = 3

Row = dict[str, Any]


def chart(name: str, base: Row, found: dict[str, list[Row]]) -> str:
    """The figures of one model.

    Args:
        name: the model's.
        base: the settings that are not changed.
        found: the rows of each sweep.
    """
    shown = [sweep for sweep in PANELS if sweep in found and not (sweep == "dp" and "experts" in found)]
    (reference,) = {tuple(row[line] for line in LINES) for row in found["tp"] if row["tp"] == base["tp"]}
    ratios = {
        (sweep, line): [(row[sweep] / base[sweep], row[line] / of) for row in found[sweep] if row[line]]
        for sweep in shown
        for line, of in zip(LINES, reference)
    }
    heights = [math.log2(y) for points in ratios.values() for _, y in points]
    low, high = math.floor(min(heights)), math.ceil(max(heights))
    parts = [text(24, 34, name, size=15, weight=700), text(24, 53, describe(base), size=12, fill=SOFT), *legend()]
    for number, sweep in enumerate(shown):
        x = LEFT + number % COLUMNS * (WIDTH + GAP_X)
        y = TOP + number // COLUMNS * (HEIGHT + GAP_Y)
        points = {line: ratios[sweep, line] for line in LINES}
        parts += panel(x, y, sweep, [row[sweep] for row in found[sweep]], base[sweep], points, low, high)
    down = TOP + math.ceil(len(shown) / COLUMNS) * (HEIGHT + GAP_Y)
    return document(LEFT + COLUMNS * (WIDTH + GAP_X) - 30, down, f"{name}: how cost grows with each setting", parts)


def describe(base: Row) -> str:
    """What is 1 in every panel."""
    sizes = "".join(f", {base[key]} {key}" for key in ("layers", "experts") if base[key])
    ranks = f"TP={base['tp']}, DP={base['dp']}"
    return f"each figure by that at {ranks}{sizes}, width {base['width']}, length {base['length']}"


def legend() -> list[str]:
    """The five lines, in a row."""
    parts, x = [], 24.0
    for words, colour, wide in LINES.values():
        parts += [stroke(f"M{x:.1f} 72h28", colour, wide), text(x + 34, 76, words, size=12)]
        x += 58 + 6.2 * len(words)
    return parts


def stroke(path: str, colour: str, wide: float = 1) -> str:
    """A line."""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{wide}" stroke-linejoin="round"/>'


def panel(
    x: float, y: float, sweep: str, values: list[int], base: int, points: dict[str, list[tuple[float, float]]],
    low: int, high: int,
) -> list[str]:  # fmt: skip
    """One setting: its values below, lines of powers of two behind, and the figures."""
    first, last = math.log2(values[0] / base), math.log2(values[-1] / base)

    def at(over: float, up: float) -> tuple[float, float]:
        return (
            x + (math.log2(over) - first) / (last - first) * WIDTH,
            y + (high - math.log2(up)) / (high - low) * HEIGHT,
        )

    parts = []
    for power in range(low, high + 1):
        _, level = at(1, 2.0**power)
        parts.append(stroke(f"M{x} {level:.1f}h{WIDTH}", "#8c959f" if power == 0 else "#e4e8ec"))
        if power % 2 == 0:
            words = str(2**power) if power >= 0 else f"1/{2**-power}"
            parts.append(text(x - 8, level + 4, words, size=11, fill=SOFT, anchor="end"))
    for value in values:
        across, _ = at(value / base, 1)
        parts.append(text(across, y + HEIGHT + 16, str(value), size=11, fill=SOFT, anchor="middle"))
    parts.append(text(x + WIDTH / 2, y + HEIGHT + 34, PANELS[sweep], size=12.5, anchor="middle", weight=600))
    for line, (_, colour, wide) in LINES.items():
        places = [at(*point) for point in points[line]]
        parts.append(stroke("M" + "L".join(f"{across:.1f} {up:.1f}" for across, up in places), colour, wide))
        parts += [
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{wide / 2 + 1}" fill="{colour}"/>' for across, up in places
        ]
    return parts
