"""The command that says by which TP size, ZeRO stage and micro-batch a model is trained on given GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from autotp_plan.planner.cli.estimate import NEEDED, size_in_bytes
from autotp_plan.planner.cli.infer import TIMEOUT, infer_with_limits, prove_on_twin
from autotp_plan.planner.cli.output import reported, say, say_json, table_console
from autotp_plan.schemas.errors import CompileError, Fault, OptionError, visible

if TYPE_CHECKING:
    from autotp_plan.planner.estimate.advice import Advice, Wanted, Way
    from autotp_plan.planner.estimate.would_fit import Would
    from autotp_plan.schemas.estimate.step import Step, StepCase
    from autotp_plan.schemas.plan.document import Plan
    from autotp_plan.sources.model_folder import ModelFolder

_MOST_RANKS = 64
"""Tensor-parallel ranks that are tried."""


@click.command()
@click.option(
    "--model", required=True, help="Checkpoint folder, id of the hub (org/name) or URL; or a config's folder."
)
@click.option("--gpus", type=click.IntRange(1, 65536), required=True, help="Number of GPUs.")
@click.option("--gpu-memory", required=True, help="Memory of a GPU, such as 80GB or 74.5GiB.")
@click.option("--gpus-per-node", type=click.IntRange(1, 65536), default=8, show_default=True, help="GPUs of a node.")
@click.option("--reserve", default="4GB", show_default=True, help="Of it for contexts, NCCL and fragments.")
@click.option("--seq-length", type=int, help="Tokens of a sequence; 4096, or what the model takes at most.")
@click.option("--global-batch-size", type=int, help="Sequences of a step, over all ranks; 8 for each GPU if not given.")
@click.option("--hardware", default="h100", show_default=True, help="h100, a100, or a file with figures of a GPU.")
@click.option("--no-run", is_flag=True, help="Read plans alone: weights and states, and no times. Needs no torch.")
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@reported
def advise(
    model: str,
    gpus: int,
    gpu_memory: str,
    gpus_per_node: int,
    reserve: str,
    seq_length: int | None,
    global_batch_size: int | None,
    hardware: str,
    no_run: bool,
    output_format: str,
) -> None:
    """Say by which TP size, ZeRO stage, micro-batch and activation checkpointing a model is best trained on given GPUs.

    Every way that fits is listed, the fastest first. Its memory is from running the model's code without data; its time
    from stated figures of the GPU, which have not been measured. The first three are estimated in full. The weights are
    bf16, the optimizer is AdamW. The exit status is 1 when nothing fits.
    """
    from autotp_plan.planner.estimate.advice import (
        Wanted,
        confirmed,
        may_fit,
        sharded,
        ways,
        with_steps,
    )
    from autotp_plan.planner.estimate.advice_text import commands, ds_config
    from autotp_plan.planner.estimate.hardware import read_hardware
    from autotp_plan.planner.estimate.step_time import Cluster

    memory = size_in_bytes(gpu_memory, "--gpu-memory") - (size_in_bytes(reserve, "--reserve") if reserve != "0" else 0)
    figures = read_hardware(hardware)
    _check_numbers(gpus, gpus_per_node, memory, gpu_memory, reserve, global_batch_size)
    batch = global_batch_size or 8 * gpus
    plans, uneven, refused = _plans(model, gpus, batch)
    wanted = Wanted(
        cluster=Cluster(gpus=gpus, per_node=gpus_per_node, hardware=figures),
        memory=memory,
        seq_length=_seq_length(next(iter(plans.values())), seq_length),
        global_batch_size=batch,
    )
    architecture = next(iter(plans.values())).model.architecture or ""
    runs = not no_run and all(importlib.util.find_spec(name) for name in NEEDED)
    given = [sharded(plan) for plan in plans.values()]
    if runs:
        hopeful = [one for one in given if may_fit(one, wanted)]
        stepped = (
            {one.plan.tp_size: one for one in with_steps(hopeful, wanted.seq_length, _run_steps)} if hopeful else {}
        )
        given = [stepped.get(one.plan.tp_size, one) for one in given]
    found = ways(given, wanted)
    by_size = {one.plan.tp_size: one for one in given}
    would: list[Would] = []
    if runs and found.fits:
        from autotp_plan.runtime.estimate.run import estimate_by_running

        found = confirmed(found, by_size, wanted, estimate_by_running, progress=_say_full)
    if not found.fits:
        from autotp_plan.planner.estimate.would_fit import what_would_fit

        more = [sharded(plan) for plan in _further_plans(model, plans)]
        would = what_would_fit(given, wanted, _run_steps if runs else None, more)
    best = next(iter(found.chosen or found.fits), None)
    if output_format == "json":
        document = _document(found, wanted, refused, would)
        if best is not None:
            document |= {
                "commands": list(commands(shlex.quote(model), best, best.tp_size in uneven)),
                "ds_config": ds_config(best),
            }
        say_json(json.dumps(document, indent=1))
    else:
        _print(found, wanted, architecture, refused, would)
        if best is not None:
            _print_commands(best, commands(shlex.quote(model), best, best.tp_size in uneven))
    if not found.fits:
        sys.exit(1)


def _plans(model: str, gpus: int, batch: int) -> tuple[dict[int, Plan], set[int], dict[int, str]]:
    """Plans by TP size, the TP sizes that are uneven, and why there is none for others."""
    from autotp_plan.sources.model_folder import model_folder

    folder = model_folder(model)
    plans: dict[int, Plan] = {}
    uneven: set[int] = set()
    refused: dict[int, str] = {}
    faults: list[Fault] = []
    for tp_size in (size for size in range(1, min(gpus, _MOST_RANKS) + 1) if gpus % size == 0):
        if batch % (gpus // tp_size):
            refused[tp_size] = f"{batch} sequences of a step are no multiple of DP={gpus // tp_size}"
            continue
        for equal in (True, False):
            try:
                plans[tp_size] = _compiled(folder, tp_size, uneven=not equal)
            except CompileError as error:
                fault = error.faults[0]
                refused[tp_size] = f"{fault.what}: {fault.where}, {fault.got}"
                faults += error.faults
            else:
                refused.pop(tp_size, None)
                if not equal:
                    uneven.add(tp_size)
                break
    if not plans and faults:
        raise CompileError(faults)
    if not plans:
        raise OptionError(
            Fault(
                code="global-batch-size",
                what="the sequences of a step cannot be divided among the data-parallel ranks",
                where="--global-batch-size",
                got=f"{batch}, and {gpus} GPUs",
                expected="a multiple of gpus / TP, for a TP size that divides the GPUs",
                next=f"--global-batch-size {-(-batch // gpus) * gpus}",
            )
        )
    return plans, uneven, refused


def _compiled(folder: ModelFolder, tp_size: int, uneven: bool) -> Plan:
    from autotp_plan.planner.compiler import compile_plan
    from autotp_plan.schemas.spec import SpecFile

    return compile_plan(
        folder,
        tp_size=tp_size,
        uneven=uneven,
        prove=lambda plan: prove_on_twin(plan, None),
        infer=lambda given: SpecFile.from_dict(infer_with_limits(given, TIMEOUT)),
    )


def _further_plans(model: str, plans: dict[int, Plan]) -> list[Plan]:
    """Plans of two and four times the largest TP size, where there are any, for more GPUs."""
    from autotp_plan.sources.model_folder import model_folder

    found = []
    for tp_size in (2 * max(plans), 4 * max(plans)):
        with contextlib.suppress(CompileError):
            found.append(_compiled(model_folder(model), tp_size, uneven=False))
    return found


def _check_numbers(gpus: int, per_node: int, memory: int, given: str, reserve: str, batch: int | None) -> None:
    faults = []
    if gpus > per_node and gpus % per_node:
        faults.append(
            Fault(
                code="gpus-per-node",
                what="the GPUs do not fill their nodes",
                where="--gpus",
                got=f"{gpus} GPUs, {per_node} in a node",
                expected=f"a multiple of {per_node}",
                next=f"--gpus {gpus // per_node * per_node}, or another --gpus-per-node",
            )
        )
    if memory <= 0:
        faults.append(
            Fault(
                code="reserve",
                what="the reserve leaves no memory",
                where="--reserve",
                got=f"{reserve} of {given}",
                expected="less than the memory of a GPU",
                next="--reserve 0",
            )
        )
    if batch is not None and batch < 1:
        faults.append(
            Fault(
                code="no-sequences",
                what="a step has no sequences",
                where="--global-batch-size",
                got=str(batch),
                expected="a number from 1 on",
                next="leave it out, or give a number from 1 on",
            )
        )
    if faults:
        raise OptionError(faults)


def _seq_length(plan: Plan, given: int | None) -> int:
    """The length that is asked for, which the model must take; or 4096, or what it takes at most."""
    from autotp_plan.schemas.estimate.settings import Settings, check_settings, longest_sequence

    length = given if given is not None else min(Settings().seq_length, longest_sequence(plan) or Settings().seq_length)
    check_settings(Settings(seq_length=length), plan)
    return length


def _run_steps(cases: Sequence[StepCase]) -> list[Step]:
    from autotp_plan.runtime.estimate.small_steps import run_small_steps

    say(f"running {len(cases)} small steps without data", err=True)
    return run_small_steps(cases)


def _say_full(way: Way) -> None:
    settings = way.settings
    say(f"estimating TP={way.tp_size} x DP={settings.dp_size}, ZeRO {settings.zero_stage} in full", err=True)


def _document(found: Advice, wanted: Wanted, refused: dict[int, str], would: list[Would]) -> dict[str, Any]:
    from autotp_plan.planner.estimate.advice_text import way_as_json

    cluster = wanted.cluster
    return {
        "gpus": cluster.gpus,
        "gpus_per_node": cluster.per_node,
        "memory": wanted.memory,
        "seq_length": wanted.seq_length,
        "global_batch_size": wanted.global_batch_size,
        "hardware": dataclasses.asdict(cluster.hardware),
        "chosen": [way_as_json(way, wanted) for way in found.chosen],
        "fits": [way_as_json(dataclasses.replace(way, estimate=None), wanted) for way in found.fits],
        "too_large": [way_as_json(way, wanted) for way in found.too_large],
        "dropped": [way_as_json(dataclasses.replace(way, estimate=None), wanted) for way in found.dropped],
        "not_planned": {str(tp_size): reason for tp_size, reason in refused.items()},
        "would_fit": [{"what": one.what, "number": one.number, **way_as_json(one.way, wanted)} for one in would],
    }


def _print(found: Advice, wanted: Wanted, model: str, refused: dict[int, str], would: list[Would]) -> None:
    from rich.text import Text

    from autotp_plan.planner.estimate import advice_text as text

    console = table_console()
    console.print(Text(visible(text.headline(model, wanted)), style="bold"))
    if found.fits:
        _print_table(console, text.fits_table(found, wanted), text.MOST_ROWS, len(found.fits), "fit")
        if found.chosen:
            console.print(visible(f"times by the figures of {wanted.cluster.hardware.name}, not measured on a GPU"))
        else:
            console.print(
                "not in it: activations, logits and loss, temporary tensors, times: the plans alone were read"
            )
    for way in found.chosen or found.fits[:3]:
        console.print(visible(text.explained(way, wanted)))
    for way in found.dropped:
        console.print(visible("dropped, for in full it does not fit: " + text.explained(way, wanted)))
    if found.too_large:
        _print_table(console, text.too_large_table(found, wanted), text.MOST_ROWS, len(found.too_large), "do not fit")
    for tp_size, reason in refused.items():
        console.print(visible(f"no plan at TP={tp_size}: {reason}"))
    if not found.fits:
        console.print(Text("nothing fits" + ("; what would:" if would else ""), style="bold"))
    for one in would:
        console.print(visible(f"- {text.would_sentence(one, wanted)}"))


def _print_table(console: Any, rows: list[tuple[str, ...]], most: int, number: int, what: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for title in rows[0]:
        table.add_column(visible(title), justify="right")
    for row in rows[1:]:
        table.add_row(*map(visible, row))
    console.print(table)
    if number > most:
        console.print(f"and {number - most} more that {what}: --format json")


def _print_commands(way: Way, lines: Sequence[str]) -> None:
    from autotp_plan.planner.estimate.advice_text import ds_config

    say("")
    for line in lines:
        say(line)
    say(f"in the DeepSpeed config: {json.dumps(ds_config(way))}")
    if way.settings.activation_checkpointing:
        say("in the training program: model.gradient_checkpointing_enable()")
