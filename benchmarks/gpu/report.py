"""docs/gpu.md: what the record of the checks on a GPU says, as a page. It reads nothing but the record."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.record import Outcome, Record, Run, State

_HEAD = """# On a GPU

Written by `make gpu` (`python -m benchmarks.gpu`), with [gpu.json](gpu.json), which has the same with all digits. Two
tensor-parallel ranks share one card and talk over gloo, through the memory of the host, because NCCL refuses two ranks
of one device; with NCCL there is one rank. What this says is that the computation is right on CUDA, what memory it
takes and how fast weights come there; it says nothing about the speed of several cards, nor about NCCL between them.

Errors are against the unsharded model on the same card: absolute in float64, relative in float32. For parity in
bfloat16 and float32 they are in units of the error that the unsharded model has itself in that dtype, against float32
(bfloat16) or float64 (float32). Each comparison is also given one number that is wrong, by a hundredth or, where the
limit is wide, by more: the error that it finds then, in the column "planted", must be above the limit.

Runs, the newest first:
"""
_ABOUT = {
    "Peak memory of training": """
Three steps of a Llama of 0.6 billion parameters in float32, 1 x 2048 tokens, AdamW, TP=2 without data parallelism (so
ZeRO has no ranks to shard over); mebibytes by torch's allocator (`max_memory_allocated`), of the first rank, or of the
rank of another system that takes more. "unsharded" is one rank without DeepSpeed. Errors are of the losses.""",
    "Loading": """
The shapes of Llama-3.1-8B in bfloat16, into the memory of the card: all bytes of both ranks, by the time of the slower.
`shards` and `checkpoint` are `load_model`; `from_pretrained` is one process with all weights; `safetensors` is
`load_file` of the same shards. "From the disk": the files are not in the page cache.""",
    "Estimates of memory": """
What `autotp-plan estimate` says of an engine's peak in bfloat16, beside what the first rank took.""",
    "Fused kernels": """
In bfloat16, with the kernel in both models; units as for parity.""",
}


def page(record: Record) -> str:
    """Markdown of a record: each check with its newest result on a card, and what never ran on one."""
    lines = [_HEAD, *(_about_run(run) for run in record.runs), ""]
    names = record.names()
    never = [name for _, name in names if record.latest(name, on_card=True) is None]
    lines += _never(record, never)
    for topic in dict.fromkeys(topic for topic, _ in names):
        lines += _table(record, topic, [name for of, name in names if of == topic])
    for run in record.runs[:1]:
        for one in run.failed:
            lines += ["", f"`{one.name}`:", "", "```", *one.reason.strip().splitlines()[-25:], "```"]
    return "\n".join(lines) + "\n"


def row(outcome: Outcome) -> str:
    """One line of what became of a check."""
    return f"{outcome.state.value:14} {outcome.name:45} {_errors(outcome)}  {outcome.seconds:.1f} s  {_reason(outcome)}"


def _where(run: Run) -> str:
    return f"{run.card or 'CPU'}, {run.date}"


def _about_run(run: Run) -> str:
    card = f"{run.card}, {run.memory:.0f} GiB" if run.card and run.memory else run.card or "CPU"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    counts = {state: sum(one.state is state for one in run.outcomes) for state in State}
    counted = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    small = "" if run.card else ", small models"
    note = f" {run.note}" if run.note else ""
    checks = f"{len(run.outcomes)} checks in {run.seconds:.0f} s ({counted})"
    return f"- **{card}**, {run.date}{small}: {checks}. {versions}.{note}"


def _never(record: Record, names: list[str]) -> list[str]:
    """What the record has no result for that a card gave."""
    if not names:
        return ["Every check below has run on a card.", ""]
    lines = ["## What never ran on a card", ""]
    lines += [
        "They ran on a CPU alone, with small models, or not at all. No table after this one has figures of them.",
        "",
    ]
    lines += ["| check | on a CPU | error | limit | planted |", "|---|---|---|---|---|"]
    for name in names:
        found = record.latest(name, on_card=False)
        if found is None:
            lines.append(f"| {name} | {_not_run(record, name)} | | | |")
        else:
            run, one = found
            lines.append(f"| {name} | {one.state.value}, {run.date} | {_cells(one)} |")
    return [*lines, ""]


def _not_run(record: Record, name: str) -> str:
    """Why there is no result."""
    states = [one for run in record.runs for one in run.outcomes if one.name == name]
    return states[0].reason or states[0].state.value


def _table(record: Record, topic: str, names: list[str]) -> list[str]:
    """The newest results of a topic on a card."""
    results = [record.latest(name, on_card=True) for name in names]
    found = [one for one in results if one is not None]
    if not found:
        return []
    columns = _columns([outcome for _, outcome in found])
    lines = [f"## {topic}", ""]
    lines += [_ABOUT[topic].strip(), ""] if topic in _ABOUT else []
    lines.append(f"| check | error | limit | planted |{''.join(f' {name} |' for name in columns)} figures | s | run |")
    lines.append(f"|---|---|---|---|{'---|' * len(columns)}---|---|---|")
    for run, one in found:
        shown = "".join(f" {_figure(one.figures[name])} |" for name in columns)
        rest = ", ".join(f"{name} {_figure(value)}" for name, value in one.figures.items() if name not in columns)
        state = "**failed** " if one.state is State.FAILED else ""
        lines.append(f"| {state}{one.name} | {_cells(one)} |{shown} {rest} | {one.seconds:.1f} | {_where(run)} |")
    return [*lines, ""]


def _columns(outcomes: list[Outcome]) -> list[str]:
    """The figures that all checks of a topic have."""
    first, *others = outcomes
    return [name for name in first.figures if all(name in one.figures for one in others)] if others else []


def _cells(outcome: Outcome) -> str:
    numbers = (outcome.worst, outcome.limit, outcome.planted)
    return " | ".join("" if number is None else f"{number:.1e}" for number in numbers)


def _errors(outcome: Outcome) -> str:
    planted = "" if outcome.planted is None else f", planted {outcome.planted:.1e}"
    return "" if outcome.worst is None else f"{outcome.worst:.1e} of {outcome.limit}{planted}"


def _reason(outcome: Outcome) -> str:
    return outcome.reason.strip().splitlines()[-1] if outcome.reason.strip() else ""


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
