"""`autotp-plan show`: a plan as a table, as JSON, as a page with pictures, or one layer of it as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotp_plan.planner.cli.output import is_stdout, reported, say, say_json_pieces, table_console, write_output
from autotp_plan.schemas.errors import Fault, OptionError, visible

if TYPE_CHECKING:
    from autotp_plan.schemas.plan.document import Plan

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--html", type=_FILE, help="Write a page that draws the model, each weight with the parts of the ranks.")
@click.option("--svg", type=_FILE, help="Write a picture of one layer: of the kind that holds most of the model.")
@click.option(
    "--estimate", type=_FILE, help="Draw this too on the page: what `autotp-plan estimate --format json` printed."
)
@reported
def show(
    plan_file: Path,
    output_format: str,
    html: Path | None = None,
    svg: Path | None = None,
    estimate: Path | None = None,
) -> None:
    """Show a plan as a table, expanded as JSON, or drawn: as a page or as a picture."""
    from autotp_plan.planner.plan_table import json_pieces
    from autotp_plan.schemas.plan.document import Plan

    if estimate is not None and html is None:
        raise OptionError(_needs_a_page(estimate))
    plan = Plan.read(plan_file)
    if html is not None or svg is not None:
        _draw(plan, html, svg, estimate)
    elif output_format == "json":
        say_json_pieces(json_pieces(plan))
    else:
        _print_table(plan)


def _draw(plan: Plan, html: Path | None, svg: Path | None, estimate: Path | None) -> None:
    from autotp_plan.planner.pictures.estimate_file import read_estimate
    from autotp_plan.planner.pictures.layer_svg import layer_svg
    from autotp_plan.planner.pictures.page import page

    if html is not None:
        write_output(html, page(plan, None if estimate is None else read_estimate(estimate, plan.fingerprint)))
        say(f"{html}: a page that needs no network", err=is_stdout(html))
    if svg is not None:
        write_output(svg, layer_svg(plan))
        say(f"{svg}: one layer", err=is_stdout(svg))


def _needs_a_page(estimate: Path) -> Fault:
    return Fault(
        code="estimate-without-a-page",
        what="an estimate is drawn on a page, and no page was asked for",
        where="--estimate",
        got=str(estimate),
        expected="--html with it",
        next="add --html report.html",
    )


def _print_table(plan: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    from autotp_plan.planner.plan_table import describe, groups, headline, human_bytes

    console = table_console()
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for title in ("parameter", "shape", "style", "each rank holds", "per rank", "rule"):
        right = title in ("shape", "per rank")
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=title != "rule")
    for prefix, rows in groups(plan):
        indent = "  " if prefix else ""
        if prefix:
            table.add_row(visible(prefix))
        for row in rows:
            name, size = row.name.removeprefix(prefix), human_bytes(row.bytes_per_rank)
            style = "dim" if row.style.startswith("replicated") else None
            cells = (indent + name, row.shape, row.style, row.share, size, row.rule)
            table.add_row(*map(visible, cells), style=style)
    console.print(Text(visible(headline(plan)), style="bold"))
    console.print(table)
    for line in describe(plan):
        console.print(visible(line))
