"""The command that says what a training step of a plan takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotp_plan.planner.cli.output import reported, say, say_json, table_width
from autotp_plan.schemas.errors import Fault, MissingDependencyError, OptionError, visible

if TYPE_CHECKING:
    from autotp_plan.schemas.estimate.document import Estimate
    from autotp_plan.schemas.estimate.settings import Settings
    from autotp_plan.schemas.plan.document import Plan

NEEDED = ("torch", "transformers", "deepspeed", "accelerate")
"""Packages that running a step without data takes."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?")
_FILE = click.Path(path_type=Path)


def size_in_bytes(text: str, where: str) -> int:
    """`80GB` (10^9) or `74.5GiB` (2^30) as bytes.

    Raises:
        OptionError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise OptionError(
            Fault(
                code="size",
                what="this is not a size",
                where=where,
                got=text,
                expected="a number above 0 with a unit: 80GB (10^9 bytes), 74.5GiB (2^30 bytes)",
                next=f"give the memory of a device as {where} 80GB",
            )
        )
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--dp-size", type=int, help="Number of data-parallel ranks; 1 if not given.")
@click.option("--zero-stage", type=int, help="Stage of ZeRO, 0 to 3; 0 if not given.")
@click.option("--micro-batch-size", type=int, help="Sequences that a data-parallel rank is given at a time; 1.")
@click.option("--seq-length", type=int, help="Tokens of a sequence; 4096, or what the model takes at most.")
@click.option("--gradient-accumulation-steps", type=int, help="Forwards and backwards of one step; 1 if not given.")
@click.option("--dtype", help="Of the weights: bf16, fp16 or fp32; bf16 if not given.")
@click.option("--optimizer", help="adamw, adam, lion, sgd or momentum (SGD with momentum); adamw if not given.")
@click.option("--offload", help="none, or optimizer: master weights and optimizer states lie in the host's memory.")
@click.option("--activation-checkpointing", is_flag=True, help="Layers compute their insides again in the backward.")
@click.option("--selective-checkpointing", is_flag=True, help="Instead: they keep matrix products and all-reduces.")
@click.option("--loss-chunks", type=int, help="The loss from this many chunks of the logits; all at once if not given.")
@click.option("--device", help="cuda: attention by fused kernels, as on a GPU (the default); cpu: as on the CPU.")
@click.option("--ds-config", type=_FILE, help="DeepSpeed config: what it says, where no option says otherwise.")
@click.option("--memory", help="Memory of a device, such as 80GB or 74.5GiB: does the fullest rank fit?")
@click.option("--no-run", is_flag=True, help="Read the plan alone: weights, gradients and states. Needs no torch.")
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@reported
def estimate(
    plan_file: Path, ds_config: Path | None, memory: str | None, no_run: bool, output_format: str, **given: Any
) -> None:
    """What a training step of a plan takes: memory at its peak, communication, floating-point operations.

    The planned model's own code and DeepSpeed's engine run two steps of one rank, on tensors without data, in a process
    group that is not there: no GPU and no memory of that size is needed. With --memory the exit status is 1 when the
    fullest rank does not fit.
    """
    from autotp_plan.planner.estimate.from_plan import estimate_from_plan
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(plan_file)
    config = _config(ds_config)
    settings = _settings(plan, config, str(ds_config), given)
    most = size_in_bytes(memory, "--memory") if memory is not None else None
    found = estimate_from_plan(plan, settings) if no_run else _run(plan, settings, config)
    if output_format == "json":
        document = found.to_dict()
        if most is not None:
            document["memory"] = {"bytes": most, "margin": most - found.fullest.peak}
        say_json(json.dumps(document, indent=1))
    else:
        _print(found)
        if most is not None:
            say(_verdict(found, most))
    if most is not None and found.fullest.peak > most:
        sys.exit(1)


def _config(path: Path | None) -> dict[str, Any]:
    from autotp_plan.schemas import documents

    if path is None:
        return {}
    found = documents.read_json(path, "DeepSpeed config")
    if isinstance(found, dict):
        return found
    raise OptionError(
        Fault(
            code="ds-config-object",
            what="the DeepSpeed config is not a JSON object",
            where=str(path),
            got=type(found).__name__,
            expected="an object",
            next="give the file that the job is started with",
        )
    )


def _settings(plan: Plan, config: dict[str, Any], where: str, given: dict[str, Any]) -> Settings:
    from autotp_plan.schemas.estimate.settings import Settings, check_settings, longest_sequence, of_ds_config

    said = {name: value for name, value in given.items() if value is not None and value is not False}
    settings = Settings(**{**of_ds_config(config, where), **said})
    if "seq_length" not in said:
        length = min(settings.seq_length, longest_sequence(plan) or settings.seq_length)
        settings = dataclasses.replace(settings, seq_length=length)
    check_settings(settings, plan)
    return settings


def _run(plan: Plan, settings: Settings, config: dict[str, Any]) -> Estimate:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            Fault(
                code="estimate-needs-packages",
                what="running a training step without data needs packages that planning does not need",
                where="estimate",
                got=f"no {', '.join(missing)}",
                expected=", ".join(NEEDED),
                next="pip install 'autotp-plan[train]'; or --no-run, for what the plan alone says",
            )
        )
    from autotp_plan.runtime.estimate.run import estimate_by_running

    say("running two training steps without data", err=True)
    return estimate_by_running(plan, settings, config)


def _verdict(found: Estimate, memory: int) -> str:
    from autotp_plan.planner.plan_table import human_bytes

    peak = found.fullest.peak
    left = human_bytes(abs(memory - peak))
    if peak <= memory:
        return f"fits: {human_bytes(peak)} of {human_bytes(memory)}, {left} to spare ({1 - peak / memory:.1%})"
    return f"does not fit: {human_bytes(peak)} of {human_bytes(memory)}, {left} too much"


def _print(found: Estimate) -> None:
    from rich.console import Console
    from rich.text import Text

    from autotp_plan.planner.estimate.as_text import headline, rank_tables

    piped = not sys.stdout.isatty()
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=piped, width=table_width())
    console.print(Text(visible(headline(found)), style="bold"))
    for rank in found.ranks:
        _print_tables(console, rank_tables(found, rank))
    for what in found.missing:
        console.print(visible(f"not in it: {what}"))


def _print_tables(console: Any, tables: list[list[tuple[str, ...]]]) -> None:
    from rich.table import Table

    for rows in tables:
        table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
        for at, title in enumerate(rows[0]):
            table.add_column(visible(title), justify="left" if at == 0 else "right", no_wrap=at > 0, overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(visible, row))
        console.print(table)
