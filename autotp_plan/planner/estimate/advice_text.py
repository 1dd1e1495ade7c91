"""Advice as tables and sentences, for people. Returns data; printing is the CLI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotp_plan.planner.estimate.advice import Advice, Wanted, Way
from autotp_plan.planner.estimate.would_fit import Would
from autotp_plan.planner.plan_table import human_bytes

MOST_ROWS = 16
"""Of a table; JSON has all."""
_SETTINGS = ("TP", "DP", "ZeRO", "recompute", "batch", "passes")
_TIMES = ("step s", "compute", "TP s", "DP s")


def headline(model: str, wanted: Wanted) -> str:
    """What is asked for."""
    cluster = wanted.cluster
    nodes = -(-cluster.gpus // cluster.per_node)
    return (
        f"{model or 'a model without a config'} on {cluster.gpus} GPUs in {nodes} node{'s' * (nodes > 1)}, "
        f"{human_bytes(wanted.memory)} of each: {wanted.global_batch_size} x {wanted.seq_length} tokens a step, "
        "bf16, adamw"
    )


def fits_table(found: Advice, wanted: Wanted) -> list[tuple[str, ...]]:
    """What fits, the fastest first; the first row has the titles."""
    timed = any(way.time is not None for way in found.fits)
    rows = [_row(way, wanted, timed) for way in found.fits[:MOST_ROWS]]
    return [(*_SETTINGS, "peak GiB", "spare", *(_TIMES if timed else ())), *rows]


def too_large_table(found: Advice, wanted: Wanted) -> list[tuple[str, ...]]:
    """What does not fit, and by how much; what lacks least first."""
    rows = [
        (*_settings(way)[:4], _gib(way.peak), _gib(way.peak - wanted.memory)) for way in found.too_large[:MOST_ROWS]
    ]
    return [(*_SETTINGS[:4], "at least GiB", "too much"), *rows]


def explained(way: Way, wanted: Wanted) -> str:
    """A way in a sentence: what its time and its memory go to."""
    settings, spare = way.settings, wanted.memory - way.peak
    words = [f"{_name(way)}:"]
    if way.time is not None:
        time = way.time
        share = {
            "computing": time.computing,
            f"all-reduces over the {way.tp_size} tensor-parallel ranks {_place(way.tp_size, wanted)}": time.tensor,
            f"collectives over the {settings.dp_size} data-parallel ranks "
            f"{_place(way.tp_size * settings.dp_size, wanted)}": time.data - time.hidden,
            "the optimizer": time.optimizer,
        }
        said = [
            f"{seconds / time.total:.0%} {what}" for what, seconds in share.items() if seconds >= 0.005 * time.total
        ]
        words.append(f"{time.total:.3g} s a step, {', '.join(said)};")
    words.append(f"{human_bytes(way.peak)} at the peak, {human_bytes(spare)} to spare")
    if way.estimate is not None:
        most = way.estimate.fullest
        words.append(
            f"({most.at_peak[0].what} {human_bytes(most.at_peak[0].bytes)}, in the {most.when.partition(',')[0]})"
        )
    return " ".join(words) + "."


def would_sentence(would: Would, wanted: Wanted) -> str:
    """What would make it fit."""
    ends = f"{_name(would.way)} takes {human_bytes(would.way.peak)}"
    if would.way.time is None:
        ends += " for weights, gradients and states alone"
    if would.what == "gpus":
        return f"{would.number} GPUs: {ends}"
    if would.what == "offload":
        return f"master weights and optimizer states on the host, {human_bytes(would.number)} for each GPU: {ends}"
    return f"sequences of {would.number} tokens: {ends}"


def ds_config(way: Way) -> dict[str, Any]:
    """The keys of a DeepSpeed config that train so."""
    settings = way.settings
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": True},
    }


def way_as_json(way: Way, wanted: Wanted) -> dict[str, Any]:
    """A way as JSON has it; sizes are bytes, times are seconds."""
    settings, time = way.settings, way.time
    document: dict[str, Any] = {
        "tp_size": way.tp_size,
        "dp_size": settings.dp_size,
        "zero_stage": settings.zero_stage,
        "activation_checkpointing": settings.activation_checkpointing,
        "micro_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "seq_length": settings.seq_length,
        "peak": way.peak,
        "margin": wanted.memory - way.peak,
        "seconds": None,
    }
    if time is not None:
        parts = ("computing", "tensor", "data", "hidden", "optimizer", "total")
        document["seconds"] = {part: getattr(time, part) for part in parts}
    if way.estimate is not None:
        document["estimate"] = way.estimate.to_dict()
    return document


def _settings(way: Way) -> tuple[str, ...]:
    settings = way.settings
    return (
        str(way.tp_size),
        str(settings.dp_size),
        str(settings.zero_stage),
        "yes" if settings.activation_checkpointing else "no",
        str(settings.micro_batch_size),
        str(settings.gradient_accumulation_steps),
    )


def _row(way: Way, wanted: Wanted, timed: bool) -> tuple[str, ...]:
    row = (*_settings(way), _gib(way.peak), _gib(wanted.memory - way.peak))
    if not timed:
        return row
    if way.time is None:
        return (*row, "", "", "", "")
    time = way.time
    return (
        *row,
        *(f"{seconds:.2f}" for seconds in (time.total, time.computing, time.tensor, time.data - time.hidden)),
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def _name(way: Way) -> str:
    settings = way.settings
    again = ", activation checkpointing" if settings.activation_checkpointing else ""
    mesh = f"TP={way.tp_size} x DP={settings.dp_size}, ZeRO {settings.zero_stage}"
    return f"{mesh}, micro-batch {settings.micro_batch_size}{again}"


def _place(ranks: int, wanted: Wanted) -> str:
    return "inside of a node" if ranks <= wanted.cluster.per_node else "between nodes"


def commands(model: str, way: Way, uneven: bool) -> Sequence[str]:
    """The commands that compile the plan and estimate the step."""
    settings = way.settings
    options = [
        f"--dp-size {settings.dp_size}",
        f"--zero-stage {settings.zero_stage}",
        f"--micro-batch-size {settings.micro_batch_size}",
        f"--seq-length {settings.seq_length}",
        f"--gradient-accumulation-steps {settings.gradient_accumulation_steps}",
        *["--activation-checkpointing"] * settings.activation_checkpointing,
    ]
    return (
        f"autotp-plan compile --model {model} --tp {way.tp_size}{' --uneven' * uneven} -o plan.json",
        f"autotp-plan estimate plan.json {' '.join(options)}",
    )
