"""The `autotp-plan` command: typed arguments, plain library calls, and the only place that prints or exits.

Exit status: 0 when all is well, 1 for a plan that `verify` does not prove, 2 for any fault in what the user gave us.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from autotp_plan.schemas.errors import AutoTPError, Fault, ShardsError

if TYPE_CHECKING:
    from rich.console import Console

    from autotp_plan.runtime.proof import Proof
    from autotp_plan.schemas.plan import Plan

_F = TypeVar("_F", bound=Callable[..., None])
_FILE = click.Path(path_type=Path)


def _reported(function: _F) -> _F:
    """Turn known errors into a message on stderr and exit status 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except AutoTPError as error:
            _fail(error.faults)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            _fail([_refused(error)])

    return run  # type: ignore[return-value]


def _fail(faults: Sequence[Fault]) -> None:
    for fault in faults:
        click.echo(click.style("error: ", fg="red", bold=True, reset=True) + str(fault), err=True)
    if len(faults) > 1:
        click.echo(f"{len(faults)} errors; nothing was written", err=True)
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autotp-plan", prog_name="autotp-plan")
def main() -> None:
    """Plan how a model is cut for tensor-parallel training under DeepSpeed, check it, and cut it.

    \b
    autotp-plan compile --model CHECKPOINT --tp 4 -o plan.json
    autotp-plan show plan.json
    autotp-plan verify plan.json
    autotp-plan presplit plan.json --checkpoint CHECKPOINT -o SHARDS
    """


@main.command()
@click.option("--model", type=_FILE, required=True, help="Checkpoint folder, or a folder with a bare config.json.")
@click.option("--tp", "tp_size", type=int, help="Number of tensor-parallel ranks.")
@click.option("-o", "--output", type=_FILE, required=True, help="Plan file to write.")
@click.option("--preset", default="auto", show_default=True, help="auto (by model_type), none, or a preset's name.")
@click.option("--spec", "specs", type=_FILE, multiple=True, help="Spec file; may be repeated, the first counts most.")
@click.option("--uneven", is_flag=True, help="Give ranks shares of unequal size where the TP size does not divide.")
@click.option("--ds-config", type=_FILE, help="DeepSpeed config; its tensor_parallel section is honoured.")
@_reported
def compile(
    model: Path,
    tp_size: int | None,
    output: Path,
    preset: str,
    specs: tuple[Path, ...],
    uneven: bool,
    ds_config: Path | None,
) -> None:
    """Compile a plan: decide how every parameter of a model is cut."""
    from autotp_plan.planner.compiler import compile_plan
    from autotp_plan.planner.deepspeed_config import read_deepspeed_config
    from autotp_plan.planner.sources import read_spec_file
    from autotp_plan.schemas.documents import write_atomically

    faults: list[Fault] = []
    files = []
    for path in specs:
        try:
            files.append(read_spec_file(path))
        except AutoTPError as error:
            prefix = f"{path}: " if len(specs) > 1 else ""
            faults += [Fault(what=f.what, where=prefix + f.where, got=f.got, expected=f.expected, next=f.next)
                       for f in error.faults]  # fmt: skip
    section = None
    if ds_config is not None:
        try:
            section = read_deepspeed_config(ds_config)
        except AutoTPError as error:
            faults += error.faults
    if faults:
        raise AutoTPError(faults)
    plan = compile_plan(
        model, tp_size=tp_size, preset=preset, specs=files, uneven=uneven, deepspeed=section, prove=_prove
    )
    try:
        write_atomically(output, plan.to_json())
    except OSError as error:
        raise ShardsError(_not_written(output, error)) from None
    _report_compiled(plan, output)


def _prove(plan: Plan) -> Any:
    """Try the plan of a model without a preset on a twin; takes torch, transformers and DeepSpeed."""
    from autotp_plan.runtime.verify import try_plan

    click.echo(f"there is no preset: trying transformers' tp_plan on a twin at TP={plan.tp_size}", err=True)
    return try_plan(plan)


def _report_compiled(plan: Plan, output: Path) -> None:
    from autotp_plan.planner.show import human_bytes, summary

    for note in plan.notes:
        click.echo(f"note: {note}", err=True)
    totals = summary(plan)
    largest = max(totals.per_rank)
    click.echo(
        f"{output}: {totals.num_parameters} parameters at TP={plan.tp_size}; "
        f"{human_bytes(largest)} of {human_bytes(totals.total)} on a rank, "
        f"{human_bytes(totals.replicated)} of it replicated"
    )


@main.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--checkpoint", type=_FILE, help="Check that this checkpoint holds what the plan says, too.")
@_reported
def check(plan_file: Path, checkpoint: Path | None) -> None:
    """Check a plan: schema, fingerprint, coverage, units, column-row pairing, ties, and the checkpoint."""
    from autotp_plan.planner.check import check_checkpoint, check_plan
    from autotp_plan.schemas.plan import Plan

    plan = Plan.read(plan_file)
    faults = check_plan(plan)
    if checkpoint is not None:
        faults += check_checkpoint(plan, checkpoint)
    if faults:
        raise AutoTPError(faults)
    against = f" and {checkpoint} holds what it says" if checkpoint else ""
    click.echo(f"{plan_file}: the plan is sound{against}")


@main.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_reported
def show(plan_file: Path, output_format: str) -> None:
    """Show a plan as a table, or expanded as JSON."""
    from autotp_plan.planner.show import as_json
    from autotp_plan.schemas.plan import Plan

    plan = Plan.read(plan_file)
    if output_format == "json":
        click.echo(json.dumps(as_json(plan), indent=1))
    else:
        _print_table(plan)


def _console() -> Console:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal else 160
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=not terminal, width=width)


def _print_table(plan: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    from autotp_plan.planner.show import describe, groups, headline, human_bytes

    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for title in ("parameter", "shape", "style", "each rank holds", "per rank", "rule"):
        right = title in ("shape", "per rank")
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=title != "rule")
    for prefix, rows in groups(plan):
        indent = "  " if prefix else ""
        if prefix:
            table.add_row(prefix)
        for row in rows:
            name, size = row.name.removeprefix(prefix), human_bytes(row.bytes_per_rank)
            style = "dim" if row.style.startswith("replicated") else None
            table.add_row(indent + name, row.shape, row.style, row.share, size, row.rule, style=style)
    console.print(Text(headline(plan), style="bold"))
    console.print(table)
    for line in describe(plan):
        console.print(line)


@main.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--no-stamp", is_flag=True, help="Leave the plan file as it is.")
@click.option("--attention", multiple=True, type=click.Choice(["eager", "sdpa"]), help="Only this one; repeatable.")
@_reported
def verify(plan_file: Path, output_format: str, no_stamp: bool, attention: tuple[str, ...]) -> None:
    """Prove a plan: a small twin of its model, dense and sharded, compared number for number on this machine's CPU.

    A plan that is proven gets a stamp, which `show` displays; the exit status is 1 when it is not. Errors are absolute,
    over the largest magnitude in a tensor where that is above 1.
    """
    from autotp_plan.schemas.documents import write_atomically
    from autotp_plan.schemas.plan import Plan

    plan = Plan.read(plan_file)
    proof = _verified(plan, tuple(dict.fromkeys(attention)))
    if output_format == "json":
        click.echo(json.dumps(proof.to_dict(), indent=1, allow_nan=False))
    else:
        _print_proof(proof)
    if not proof.proven:
        sys.exit(1)
    if not no_stamp:
        try:
            write_atomically(plan_file, dataclasses.replace(plan, verified=proof.stamp()).to_json())
        except OSError as error:
            raise ShardsError(_not_written(plan_file, error)) from None


def _verified(plan: Plan, attention: tuple[str, ...]) -> Proof:
    from autotp_plan.runtime.verify import ATTENTION, verify_plan

    attention = attention or ATTENTION
    if not sys.stderr.isatty():
        return verify_plan(plan, attention=attention)
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        return verify_plan(plan, attention=attention, progress=status.update)


def _print_proof(proof: Proof) -> None:
    from rich.table import Table
    from rich.text import Text

    from autotp_plan.runtime.proof import FLOAT64_TOLERANCE, error_text

    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("largest error of", overflow="fold", no_wrap=True)
    for title in ("gradient", "over two passes", "value after two steps"):
        table.add_column(title, justify="right")
    for row in proof.rows():
        errors = (row.gradient, row.accumulated, row.stepped)
        wrong = any(error is not None and error > FLOAT64_TOLERANCE for error in errors)
        table.add_row(row.name, *map(error_text, errors), style="red" if wrong else None)
    console.print(Text(proof.headline(), style="bold"))
    console.print(table)
    for line in proof.conclusions():
        console.print(line)


@main.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--checkpoint", type=_FILE, required=True, help="The checkpoint to cut.")
@click.option("-o", "--output", type=_FILE, required=True, help="New folder for the shards.")
@click.option("--workers", type=int, default=4, show_default=True, help="Tensors cut at the same time.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@_reported
def presplit(plan_file: Path, checkpoint: Path, output: Path, workers: int, quiet: bool) -> None:
    """Cut a checkpoint into a folder of per-rank shards that needs nothing else to train from."""
    from autotp_plan.planner.presplit import presplit as run
    from autotp_plan.planner.show import human_bytes
    from autotp_plan.schemas.plan import Plan

    plan = Plan.read(plan_file)
    started = time.monotonic()
    if quiet or not sys.stderr.isatty():
        manifest = run(plan, checkpoint, output, workers=workers)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            "{task.description}",
            BarColumn(),
            DownloadColumn(True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("presplit", total=None)
            manifest = run(
                plan,
                checkpoint,
                output,
                workers=workers,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    if not quiet:
        seconds = time.monotonic() - started
        size = sum(file.size for file in manifest.files)
        click.echo(
            f"{output}: {len(manifest.files)} files, {human_bytes(size)} for {plan.tp_size} ranks in {seconds:.1f} s"
        )


@main.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--to", "target", type=click.Choice(["deepspeed"]), required=True, help="What to write it for.")
@click.option("-o", "--output", type=_FILE, help="File to write; default: standard output.")
@_reported
def export(plan_file: Path, target: str, output: Path | None) -> None:
    """Write a plan as a partition_config for plain DeepSpeed, or say what that cannot express (exit status 1)."""
    from autotp_plan.planner.export import export_to_deepspeed
    from autotp_plan.schemas.documents import format_json, write_atomically
    from autotp_plan.schemas.plan import Plan

    plan = Plan.read(plan_file)
    exported = export_to_deepspeed(plan)
    if exported.obstacles:
        click.echo(f"{plan_file}: plain {target} cannot express this plan; nothing was written", err=True)
        for obstacle in exported.obstacles:
            click.echo(f"  {obstacle.where}: {obstacle.reason}", err=True)
        sys.exit(1)
    for name in exported.whole:
        click.echo(f"note: {name} is whole on every rank there, which is right and takes more memory", err=True)
    section = {"autotp_size": plan.tp_size, "partition_config": exported.partition_config}
    text = format_json({"tensor_parallel": section})
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise ShardsError(_not_written(output, error)) from None
    click.echo(f"{output}: a tensor_parallel section for a DeepSpeed config")


@main.group()
def presets() -> None:
    """The architectures that are known."""


@presets.command("list")
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_reported
def list_presets(output_format: str) -> None:
    """List the presets."""
    from rich.console import Console
    from rich.table import Table

    from autotp_plan.planner.sources import preset_names, read_preset

    found = [read_preset(name) for name in preset_names()]
    if output_format == "json":
        rows = [
            {"name": one.name, "model_types": list(one.model_types), "description": one.description} for one in found
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("preset", "model_type", "what it covers"):
        table.add_column(title, overflow="fold")
    for one in found:
        table.add_row(one.name, ", ".join(one.model_types), one.description)
    Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


@presets.command("show")
@click.argument("name")
@_reported
def show_preset(name: str) -> None:
    """Print a preset: a spec file, to read or to start one's own from."""
    from autotp_plan.planner.sources import preset_text

    click.echo(preset_text(name), nl=False)


def _refused(error: OSError) -> Fault:
    return Fault(
        what="the operating system refused",
        where=str(error.filename or "a file"),
        got=error.strerror or str(error),
        expected="paths that can be read and written",
        next="check the path and its permissions",
    )


def _not_written(path: Path, error: OSError) -> Fault:
    return Fault(
        what="the plan cannot be written",
        where=str(path),
        got=error.strerror or str(error),
        expected="a file in a folder that exists and can be written to",
        next="make the folder, or give another path",
    )


if __name__ == "__main__":
    main()
