"""What `benchmarks.training` found, for people: a table in the terminal, a Markdown page, a chart, a JSON file.

It knows the goals, and what is compared with what: this project with the better of the two other tensor-parallel
systems, in each column, among those that computed the right losses.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

MIB = 2**20
NAMES = {"ours": "autotp-plan", "autotp": "DeepSpeed AutoTP", "transformers": "transformers TP", "dense": "unsharded"}
RIVALS = ("autotp", "transformers")
PACKAGES = ("autotp-plan", "torch", "deepspeed", "transformers", "accelerate", "safetensors")

COLUMNS: list[tuple[str, str, float, str]] = [
    # name, figure, in units of, format
    ("ready s", "ready_seconds", 1, ".2f"),
    ("of it load s", "load_seconds", 1, ".2f"),
    ("CPU s", "ready_cpu_seconds", 1, ".2f"),
    ("1st step s", "first_step_seconds", 1, ".2f"),
    ("read MiB", "weights_read", MIB, ".0f"),
    ("load own MiB", "load_own_bytes", MIB, ".0f"),
    ("load anon MiB", "load_anon_bytes", MIB, ".0f"),
    ("load PSS MiB", "load_pss_bytes", MIB, ".0f"),
    ("train anon MiB", "train_anon_bytes", MIB, ".0f"),
    ("train PSS MiB", "train_pss_bytes", MIB, ".0f"),
    ("all-reduces", "all_reduces", 1, ".0f"),
    ("MiB summed", "all_reduce_bytes", MIB, ".1f"),
    ("step s", "step_seconds", 1, ".3f"),
    ("CPU s", "step_cpu_seconds", 1, ".3f"),
    ("tokens/s", "tokens_per_second", 1, ".0f"),
    ("CUDA MiB", "cuda_bytes", MIB, ".0f"),
]
GOALS = [
    # figure, at most this ratio, what it is
    ("load_seconds", 0.5, "load time, imports done"),
    ("ready_seconds", 0.5, "load time, from process start"),
    ("load_own_bytes", 0.5, "anonymous memory at load, above imports"),
    ("load_anon_bytes", 0.5, "anonymous memory at load, imports in it"),
    ("step_seconds", 0.75, "step time"),
    ("train_anon_bytes", 1.0, "anonymous memory in training"),
]
LEGEND = """\
ready s         from the start of the process until model, engine and optimizer are made
of it load s    from when the last rank has imported everything until the last is ready
CPU s           the processor time of a rank until ready, and of a step: waiting for others is not in it
1st step s      from the start of the process until the first optimizer step is done
read MiB        by a rank while it loads: rchar of /proc/self/io, and how far RssFile grew (files that are mapped)
own             how far RssAnon rose while loading, above what it was once everything was imported
anon            the peak of RssAnon while loading (imports in it) and while training, sampled every 10 ms from outside
PSS             of smaps_rollup when ready and after the last step: with mapped files, a page that ranks share in parts
all-reduces     of one step, and the bytes a rank handed to them; groups of one rank left out
step s          the median step after the first ones: forward, backward, fused AdamW; no clipping, no ZeRO, float32
ratio           this project's figure by the better of the two other tensor-parallel systems
All figures are of the worst rank, medians over the rounds. The page cache is warm."""


def describe(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """The machine, the date and the versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / MIB
    machine = f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB"
    if device == "cuda":
        import torch

        machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {machine}"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "device": device,
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "goals": {figure: limit for figure, limit, _ in GOALS},
        "command": "python -m benchmarks.training",
        "tp_sizes": options.tp,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def figure(cell: dict[str, Any], name: str) -> float | None:
    """A figure of a cell, those made of several too; None where there is none."""
    figures = cell.get("figures")
    if figures is None:
        return None
    if name == "weights_read":
        return float(figures["read_bytes"] + figures["mapped_bytes"])
    if name in figures["sent"]:
        return float(figures["sent"][name])
    value = figures.get(name)
    return None if value is None else float(value)


def ratio(cells: dict[str, dict[str, Any]], name: str) -> float | None:
    """This project's figure by the better of those of the others that are right. Of tokens more are better."""
    best = max if name == "tokens_per_second" else min
    rivals = [figure(cells[system], name) for system in RIVALS if not cells[system]["wrong"]]
    known = [value for value in rivals if value]
    ours = figure(cells["ours"], name)
    return ours / best(known) if ours is not None and known and not cells["ours"]["wrong"] else None


def sections(report: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """`(title, cells by system)` for each size and TP size."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for cell in report["cells"]:
        found.setdefault((cell["size"], cell["tp_size"]), {})[cell["system"]] = cell
    return [
        (f"{size}, {report['millions'][size]:.0f} million parameters, TP={tp_size}", cells)
        for (size, tp_size), cells in found.items()
    ]


def rows(report: dict[str, Any], cells: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table of a section, its head first, the ratios last."""
    columns = [column for column in COLUMNS if column[1] != "cuda_bytes" or report["device"] == "cuda"]
    table = [["", *(name for name, *_ in columns)]]
    for system, cell in cells.items():
        line = [NAMES[system] + (" (!)" if cell["wrong"] else "")]
        for _, name, unit, form in columns:
            value = figure(cell, name)
            skipped = system == "dense" and name in ("all_reduces", "all_reduce_bytes")
            line.append("-" if value is None or skipped else format(value / unit, form))
        table.append(line)
    ratios = [ratio(cells, name) for _, name, *_ in columns]
    table.append(["ratio", *("-" if value is None else f"{value:.2f}" for value in ratios)])
    return table


def goals(cells: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, limit, what in GOALS:
        found = ratio(cells, name)
        limits = f"below {limit:g}" if limit == 1 else f"at most {limit:g}"
        if found is None:
            lines.append(f"{what}: nothing to compare with")
        else:
            met = found < limit if limit == 1 else found <= limit
            lines.append(f"{what}: {found:.2f}, goal {limits}: {'met' if met else 'MISSED'}")
    return lines


def remarks(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Who is wrong, how close the losses are, and the efficiency."""
    lines = [f"{NAMES[system]}: {cell['wrong']}" for system, cell in cells.items() if cell["wrong"]]
    right = [cell for system, cell in cells.items() if not cell["wrong"] and system != "dense"]
    if right:
        begin, end = right[0]["loss_from_to"]
        worst = max(cell["loss_error"] for cell in right)
        steps = len(right[0]["runs"][0]["losses"])
        lines.append(
            f"losses fall from {begin:.4f} to {end:.4f} in {steps} steps; largest relative difference {worst:.1e}"
        )
    dense, ours = (figure(cells[system], "step_seconds") for system in ("dense", "ours"))
    if dense and ours:
        lines.append(f"efficiency: the unsharded step takes {dense / ours:.2f} of this project's")
    return lines


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = ["", f"{report['machine']}; {report['date']}; {report['rounds']} rounds in {report['seconds']} s"]
    lines.append("  ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for title, cells in sections(report):
        table = rows(report, cells)
        widths = [max(len(line[at]) for line in table) for at in range(len(table[0]))]
        lines += ["", title]
        for line in table:
            lines.append("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]))
        lines += [f"  {line}" for line in [*goals(cells), *remarks(cells)]]
    return "\n".join([*lines, "", LEGEND])


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Training, side by side",
        "",
        f"Written by `make bench` ({report['rounds']} rounds in {report['seconds']} s) on {report['date']}: "
        f"{report['machine']}; load average before it {report['load_before']}.",
        f"{versions}.",
        "",
        "![the same figures as a chart](benchmark.png)",
    ]
    for title, cells in sections(report):
        table = rows(report, cells)
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += [_row(table[0]), "|---" + "|---:" * (len(table[0]) - 1) + "|", *map(_row, table[1:]), ""]
        lines += [f"- {line}" for line in [*goals(cells), *remarks(cells)]]
    lines += ["", "## What the columns are", "", "```", LEGEND, "```", ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def chart(report: dict[str, Any], path: Path) -> None:
    """The four figures that have goals, as bars."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [("seconds to load, imports done", "load_seconds", 1), ("seconds of a step", "step_seconds", 1),
              ("MiB anonymous at load, above imports", "load_own_bytes", MIB),
              ("MiB anonymous, peak in training", "train_anon_bytes", MIB)]  # fmt: skip
    colours = {"ours": "#1b6ca8", "autotp": "#e08e45", "transformers": "#8aa17c", "dense": "#c9c9c9"}
    found = sections(report)
    picture, fields = pyplot.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    for field, (title, name, unit) in zip(fields.flat, panels):
        for at, (system, label) in enumerate(NAMES.items()):
            heights = [(figure(cells[system], name) or 0) / unit for _, cells in found]
            bars = field.bar([group + (at - 1.5) * 0.2 for group in range(len(found))], heights, 0.19, label=label,
                             color=colours[system])  # fmt: skip
            field.bar_label(bars, fmt="%.2f" if unit == 1 else "%.0f", fontsize=6.5)
        labels = [f"{cells['ours']['size']}, TP={cells['ours']['tp_size']}" for _, cells in found]
        field.set_xticks(range(len(found)), labels, fontsize=8)
        field.set_title(title, fontsize=10)
        field.spines[["top", "right"]].set_visible(False)
    handles, labels = fields.flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    picture.suptitle(f"{report['machine']}, {report['date']}; less is better", fontsize=9)
    picture.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(picture)


def write(report: dict[str, Any], folder: Path) -> None:
    """benchmark.json, benchmark.md and benchmark.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "benchmark.md").write_text(markdown(report))
    try:
        chart(report, folder / "benchmark.png")
    except ImportError:
        print("no chart: matplotlib is not installed (pip install 'autotp-plan[bench]')")


if __name__ == "__main__":
    import sys

    source = Path(sys.argv[1])  # a benchmark.json: print it again, and write the page and the chart again
    kept = json.loads(source.read_text())
    print(text(kept))
    write(kept, source.parent)
