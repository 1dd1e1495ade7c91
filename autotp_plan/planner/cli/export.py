"""`export`, which writes a plan for plain DeepSpeed, and the commands that list and show presets."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotp_plan.planner.cli.output import is_stdout, reported, say, say_json, table_width, write_output
from autotp_plan.schemas.errors import visible

if TYPE_CHECKING:
    from rich.table import Table

    from autotp_plan.planner.deepspeed.export import Export
    from autotp_plan.schemas.plan.document import Plan

_FILE = click.Path(path_type=Path)
_FORMAT = click.option(
    "--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True
)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--to", "target", type=click.Choice(["deepspeed"]), required=True, help="What to write it for.")
@click.option("-o", "--output", type=_FILE, help="File to write; default: standard output.")
@click.option("--partial", is_flag=True, help="Replicate what DeepSpeed cannot shard, where that is right.")
@_FORMAT
@reported
def export(plan_file: Path, target: str, output: Path | None, partial: bool, output_format: str) -> None:
    """Write a plan as a partition_config for plain DeepSpeed, or say what that cannot express.

    Exit status 1 and no config when something cannot be expressed. With --partial fused experts are replicated on every
    rank. A config that would train wrongly is never written.
    """
    from autotp_plan.planner.deepspeed.export import export_to_deepspeed
    from autotp_plan.schemas.documents import format_json
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(plan_file)
    exported = export_to_deepspeed(plan)
    written = not exported.obstacles or (partial and exported.trains_rightly)
    section = {"tensor_parallel": {"autotp_size": plan.tp_size, "partition_config": exported.partition_config}}
    _report_differences(plan_file, plan, exported, written)
    if output is not None and is_stdout(output):
        output = None
    if written and output is not None:
        write_output(output, format_json(section))
    if output_format == "json":
        say_json(json.dumps(_as_json(exported, section if written else None), indent=1))
    elif written and output is not None:
        say(f"{output}: a tensor_parallel section for a DeepSpeed config")
    elif written:
        say_json(format_json(section))
    if not written:
        sys.exit(1)


def _report_differences(plan_file: Path, plan: Plan, exported: Export, written: bool) -> None:
    """On standard error, what DeepSpeed does differently from the plan."""
    for name in exported.replicated:
        say(f"note: DeepSpeed replicates {name} on every rank, which is right and takes more memory", err=True)
    if exported.obstacles:
        outcome = "they are replicated there" if written else "nothing was written"
        say(f"{plan_file}: plain DeepSpeed cannot express these; {outcome}", err=True)
        rows = _table("where", "why")
        for obstacle in exported.obstacles:
            rows.add_row(visible(obstacle.where), visible(obstacle.reason))
        _print(rows, err=True)
    if written:
        say(f"note: each rank holds {exported.share:.2f} of the model there", err=True)
    elif exported.trains_rightly:
        say("with --partial they are replicated on every rank, which is right and takes more memory: "
                   f"{exported.share:.2f} of the model on each", err=True)  # fmt: skip
    if written and not exported.tried:
        say(
            f"note: plain DeepSpeed was not tried with model_type {plan.model.model_type}. It also divides attributes "
            "that it takes for head counts by their names: compare some steps with the unsharded model first",
            err=True,
        )


def _as_json(exported: Export, section: Mapping[str, object] | None) -> dict[str, object]:
    return {
        "expressible": not exported.obstacles,
        "trains_rightly": exported.trains_rightly,
        "tried": exported.tried,
        "share": exported.share,
        "whole": list(exported.replicated),
        "obstacles": [dataclasses.asdict(obstacle) for obstacle in exported.obstacles],
        "config": section,
    }


@click.group()
def presets() -> None:
    """The architectures that have a preset."""


@presets.command("list")
@_FORMAT
@reported
def list_presets(output_format: str) -> None:
    """List the presets."""
    from autotp_plan.planner.rules.preset_files import preset_names, read_preset

    found = [read_preset(name) for name in preset_names()]
    if output_format == "json":
        rows = [
            {"name": one.name, "model_types": one.model_types, "aliases": one.aliases, "description": one.description}
            for one in found
        ]
        say_json(json.dumps(rows, indent=1))
        return
    table = _table("preset", "model_type", "what it covers")
    for one in found:
        table.add_row(one.name, ", ".join(one.model_types), one.description)
    _print(table)


@presets.command("show")
@click.argument("name")
@reported
def show_preset(name: str) -> None:
    """Print a preset: a spec file, to read or to start another one from."""
    from autotp_plan.planner.rules.preset_files import preset_text

    say_json(preset_text(name))


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _print(table: Table, err: bool = False) -> None:
    from rich.console import Console

    width = table_width(sys.stderr if err else sys.stdout)
    Console(stderr=err, markup=False, emoji=False, highlight=False, width=width).print(table)
