"""`diff`: what changed between two plans, or a plan and a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotp_plan.planner.cli.output import reported, say_json_pieces, table_console
from autotp_plan.schemas.errors import AutoTPError, Fault, OptionError, visible
from autotp_plan.schemas.shards.manifest import PLAN_NAME

if TYPE_CHECKING:
    from autotp_plan.planner.diff.differences import Differences
    from autotp_plan.schemas.plan.document import Plan

_COLORS = {"removed": "red", "added": "green", "changed": None}


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@reported
def diff(old: str, new: str, output_format: str) -> None:
    """Show what changed between two plans, in the words of `show`.

    OLD and NEW are plans, or folders of shards with one. One of them may be a checkpoint instead (folder, id of the hub
    or URL), or a folder with a bare config.json: names, shapes, dtypes and the config are compared with the plan. Exit
    status 1 when they differ; how a plan is written is no difference.
    """
    differences = _compared(old, new)
    if output_format == "json":
        say_json_pieces(differences.json_pieces())
    else:
        _print(old, new, differences)
    if not differences.equal:
        sys.exit(1)


def _compared(old: str, new: str) -> Differences:
    from autotp_plan.planner.diff.checkpoint import turned
    from autotp_plan.planner.diff.compare import compare_plans

    plans: list[Plan | None] = []
    faults: list[Fault] = []
    for given in (old, new):
        try:
            plans.append(_plan(given))
        except AutoTPError as error:
            faults += error.faults
    if faults:
        raise AutoTPError(faults)
    before, after = plans
    if before is not None and after is not None:
        return compare_plans(before, after)
    if before is not None:
        return _with_model(before, new)
    if after is not None:
        return turned(_with_model(after, old))
    raise OptionError(
        Fault(
            code="diff-without-plan",
            what="neither of the two is a plan",
            where=f"{old} and {new}",
            got="two checkpoints",
            expected="two plans, or a plan and a checkpoint",
            next="compile a plan of one of them: `autotp-plan compile --model CHECKPOINT --tp 2 -o plan.json`",
        )
    )


def _with_model(plan: Plan, given: str) -> Differences:
    """A plan and a checkpoint, or the model of a bare config.json, which transformers builds without memory."""
    from autotp_plan.planner.diff.checkpoint import compare_checkpoint, compare_model
    from autotp_plan.planner.model.inventory import inventory_of_folder
    from autotp_plan.planner.model.tensor_names import DiskNames
    from autotp_plan.sources.model_folder import model_folder, open_checkpoint

    found = model_folder(given)
    if found.holds_tensors or found.config() is None:
        return compare_checkpoint(plan, open_checkpoint(found, plan.dequantized_dtype))
    return compare_model(plan, inventory_of_folder(found.folder, DiskNames(ignored=plan.ignored)))


def _plan(given: str) -> Plan | None:
    """The plan in a file or a folder of shards; None for a checkpoint."""
    from autotp_plan.schemas.plan.document import Plan

    path = Path(given)
    if path.is_dir():
        return Plan.read(path / PLAN_NAME) if (path / PLAN_NAME).exists() else None
    return Plan.read(path) if path.exists() or path.suffix == ".json" else None


def _print(old: str, new: str, differences: Differences) -> None:
    from rich.table import Table
    from rich.text import Text

    from autotp_plan.planner.diff.text import groups, lines

    console = table_console()
    console.print(Text(visible(f"--- {old}: {differences.old.headline}"), style="red"))
    console.print(Text(visible(f"+++ {new}: {differences.new.headline}"), style="green"))
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    found = groups(differences)
    name_width = max((len(row.name) + 2 for _, rows in found for row in rows), default=0)
    what_width = max((len(row.what) for _, rows in found for row in rows), default=0)
    whole = {
        "name": name_width <= console.width // 2,
        "what": name_width + what_width <= console.width * 2 // 3,
    }
    for title in ("name", "what", "old", "new"):
        table.add_column(title, overflow="fold", no_wrap=whole.get(title, False))
    for prefix, rows in found:
        if prefix:
            table.add_row(visible(prefix))
        for row in rows:
            name = f"  {row.name}" if prefix and row.name else row.name
            cells = [Text(visible(text)) for text in (name, row.what, row.old, row.new)]
            cells[2].stylize("red")
            cells[3].stylize("green")
            table.add_row(*cells, style=_COLORS[row.kind])
    if table.row_count:
        console.print(table)
    for line in lines(differences):
        sign = {"removed": "- ", "added": "+ ", "changed": ""}[line.kind]
        console.print(Text(visible(f"{sign}{line.text}"), style=_COLORS[line.kind] or ""))
