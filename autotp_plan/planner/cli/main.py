"""The `autotp-plan` command: typed arguments, plain library calls, and the only place that prints or exits.

Exit status: 0 when all is well, 1 for a plan that `verify` does not prove or `export` cannot express and for what
`diff` finds, 2 for any fault in what the user gave us.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotp_plan.planner.cli.advise import advise
from autotp_plan.planner.cli.diff import diff
from autotp_plan.planner.cli.estimate import estimate
from autotp_plan.planner.cli.export import export, presets
from autotp_plan.planner.cli.infer import TIMEOUT, infer, infer_with_limits, prove_on_twin, time_limit
from autotp_plan.planner.cli.job import check_job
from autotp_plan.planner.cli.module_options import given_model, module_options
from autotp_plan.planner.cli.output import (
    is_stdout,
    reported,
    say,
    say_json,
    table_console,
    write_output,
)
from autotp_plan.planner.cli.shards import check_against, check_shards, convert, merge, presplit, reshard
from autotp_plan.planner.cli.show import show
from autotp_plan.schemas.errors import AutoTPError, Fault, visible
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME, PLAN_NAME

if TYPE_CHECKING:
    from autotp_plan.factories.module_factory import ModuleFactory
    from autotp_plan.runtime.verify.report import Proof
    from autotp_plan.schemas.plan.document import Plan

_FILE = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autotp-plan", prog_name="autotp-plan")
def main() -> None:
    """Plan how a model is sharded for tensor-parallel training under DeepSpeed, check the plan, and write the shards.

    \b
    autotp-plan compile --model CHECKPOINT --tp 4 -o plan.json
    autotp-plan infer --model CHECKPOINT -o spec.json
    autotp-plan show plan.json
    autotp-plan diff old.json new.json
    autotp-plan verify plan.json
    autotp-plan estimate plan.json --dp-size 4 --zero-stage 2 --memory 80GB
    autotp-plan advise --model CHECKPOINT --gpus 16 --gpu-memory 80GB
    autotp-plan presplit plan.json --checkpoint CHECKPOINT -o SHARDS
    autotp-plan check SHARDS
    autotp-plan merge SHARDS -o CHECKPOINT
    autotp-plan reshard SHARDS --tp 8 -o SHARDS_OF_8
    autotp-plan convert BIN_CHECKPOINT -o CHECKPOINT
    """


@main.command()
@click.option(
    "--model", help="Checkpoint folder, id of the hub (org/name) or URL; or a folder with a bare config.json."
)
@module_options
@click.option("--tp", "tp_size", type=int, help="Number of tensor-parallel ranks.")
@click.option("-o", "--output", type=_FILE, required=True, help="Plan file to write.")
@click.option("--preset", default="auto", show_default=True, help="auto (by model_type), none, infer, or a preset.")
@click.option(
    "--spec", "specs", type=_FILE, multiple=True, help="Spec file; may be repeated, the first has precedence."
)
@click.option("--cut-vision", is_flag=True, help="Shard the vision tower too, where that is proven with images.")
@click.option("--sequence-parallel", is_flag=True, help="Shard the residual stream along the sequence too.")
@click.option("--uneven", is_flag=True, help="Give ranks shards of unequal size where the TP size does not divide.")
@click.option(
    "--dtype",
    type=click.Choice(["BF16", "F16", "F32"]),
    help="What weights become that are quantised on disk; BF16 if not given.",
)
@click.option("--ds-config", type=_FILE, help="DeepSpeed config; its tensor_parallel section is applied.")
@time_limit
@click.option("--strict", is_flag=True, help="A DeepSpeed config must name every weight, and each pattern must match.")
@reported
def compile(
    model: str | None,
    tp_size: int | None,
    output: Path,
    preset: str,
    specs: tuple[Path, ...],
    uneven: bool,
    ds_config: Path | None,
    strict: bool,
    factory: Callable[[], ModuleFactory | None],
    cut_vision: bool = False,
    sequence_parallel: bool = False,
    dtype: str | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Compile a plan: decide how every parameter of a model is sharded."""
    from autotp_plan.planner.compiler import compile_plan
    from autotp_plan.planner.deepspeed.read_config import read_deepspeed_config
    from autotp_plan.schemas.spec import SpecFile

    made_by = factory()
    given_model(model, made_by)
    if made_by is not None and preset == "auto" and not specs:
        preset = "infer"
    faults: list[Fault] = []
    files = []
    for path in specs:
        try:
            files.append(SpecFile.read(path))
        except AutoTPError as error:
            prefix = f"{path}: " if len(specs) > 1 else ""
            faults += [dataclasses.replace(fault, where=prefix + fault.where) for fault in error.faults]
    section = None
    if ds_config is not None:
        try:
            section = read_deepspeed_config(ds_config)
        except AutoTPError as error:
            faults += error.faults
    if faults:
        raise AutoTPError(faults)
    plan = compile_plan(
        model,
        tp_size=tp_size,
        preset=preset,
        specs=files,
        uneven=uneven,
        deepspeed=section,
        prove=lambda plan: prove_on_twin(plan, made_by),
        strict=strict,
        cut_vision=cut_vision,
        sequence_parallel=sequence_parallel,
        infer=lambda given: SpecFile.from_dict(infer_with_limits(given, timeout)),
        factory=made_by,
        dtype=dtype,
    )
    write_output(output, plan.to_json())
    _report_compiled(plan, output)


def _report_compiled(plan: Plan, output: Path) -> None:
    from autotp_plan.planner.plan_table import human_bytes, summary
    from autotp_plan.planner.stream_words import stream_words

    for note in plan.notes:
        say(f"note: {note}", err=True)
    if plan.dequantize is not None:
        say(f"the checkpoint has weights of {plan.dequantize} while they are sharded or loaded", err=True)
    if (stream := stream_words(plan)) is not None:
        say(stream, err=True)
    totals = summary(plan)
    largest = max(totals.per_rank)
    say(
        f"{output}: {totals.num_parameters} parameters at TP={plan.tp_size}; "
        f"{human_bytes(largest)} of {human_bytes(totals.total)} on a rank, "
        f"{human_bytes(totals.replicated)} of it replicated",
        err=is_stdout(output),
    )


@main.command()
@click.argument("plan_file", metavar="PLAN_SHARDS_OR_JOB", type=_FILE)
@click.option(
    "--checkpoint", help="Also check that this checkpoint (folder, id of the hub or URL) holds what the plan says."
)
@click.option("--quick", is_flag=True, help="Of shards and a checkpoint compare names, shapes and dtypes, no bytes.")
@reported
def check(plan_file: Path, checkpoint: str | None, quick: bool = False) -> None:
    """Check a plan: schema, fingerprint, coverage, units, column-row pairing, ties, and the checkpoint.

    Or a folder of shards: that every byte is what was written, and that it all belongs together; with --checkpoint,
    that it holds the bytes of the checkpoint as it is now. Or a folder of a job's checkpoints: which of them are
    complete and sound, the newest first.
    """
    from autotp_plan.planner.plan_checks import check_plan
    from autotp_plan.schemas.jobs.job_folder import is_job
    from autotp_plan.schemas.plan.document import Plan
    from autotp_plan.schemas.shards.folder import is_unfinished
    from autotp_plan.sources.check_checkpoint import check_checkpoint

    compare: Callable[[], None] | None = None
    if is_job(plan_file):
        check_job(plan_file)
        return
    if is_unfinished(plan_file) or (plan_file / MANIFEST_NAME).exists():
        shards = check_shards(plan_file)
        if checkpoint is None:
            return
        plan_file = plan_file / PLAN_NAME
        compare = None if quick else lambda: check_against(shards, checkpoint)
    plan = Plan.read(plan_file)
    faults = check_plan(plan)
    if checkpoint is not None:
        faults += check_checkpoint(plan, checkpoint)
    if faults:
        raise AutoTPError(faults)
    against = f" and {checkpoint} holds what it says" if checkpoint else ""
    say(f"{plan_file}: the plan is sound{against}")
    if compare is not None:
        compare()
    elif checkpoint is not None:
        say("compared with the checkpoint: names, shapes, dtypes and config.json, and no bytes", err=True)


@main.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--no-stamp", is_flag=True, help="Leave the plan file as it is.")
@click.option("--attention", multiple=True, type=click.Choice(["eager", "sdpa"]), help="Only this one; repeatable.")
@click.option(
    "--optimizer",
    default="adamw",
    show_default=True,
    metavar="NAME",
    help="Of the engine's steps: of torch.optim, or package.module.Class; a stamp is of adamw alone.",
)
@module_options
@reported
def verify(
    plan_file: Path,
    output_format: str,
    no_stamp: bool,
    attention: tuple[str, ...],
    optimizer: str,
    factory: Callable[[], ModuleFactory | None],
) -> None:
    """Prove a plan: run a small twin of its model, dense and sharded, on this machine's CPU, and compare all numbers.

    A plan that is proven gets a stamp, which `show` displays; the exit status is 1 when it is not. Errors are absolute,
    over the largest magnitude in a tensor where that is above 1.
    """
    from autotp_plan.schemas.plan.document import Plan

    plan = Plan.read(plan_file)
    proof = _verified(plan, tuple(dict.fromkeys(attention)), optimizer, factory())
    if output_format == "json":
        say_json(json.dumps(proof.to_dict(), indent=1, allow_nan=False))
    else:
        _print_proof(proof)
    if not proof.proven:
        sys.exit(1)
    if no_stamp or optimizer != "adamw":
        return
    if plan_file.name == PLAN_NAME and (plan_file.parent / MANIFEST_NAME).exists():
        say("not stamped: the plan is part of a shards folder, whose checksums hold it as it is", err=True)
    else:
        write_output(plan_file, dataclasses.replace(plan, verified=proof.stamp()).to_json())


def _verified(plan: Plan, attention: tuple[str, ...], optimizer: str, factory: ModuleFactory | None) -> Proof:
    from autotp_plan.runtime.verify.run import ATTENTION, verify_plan

    attention = attention or ATTENTION
    if not sys.stderr.isatty():
        return verify_plan(plan, attention=attention, optimizer=optimizer, factory=factory)
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        return verify_plan(plan, attention=attention, optimizer=optimizer, progress=status.update, factory=factory)


def _print_proof(proof: Proof) -> None:
    from rich.table import Table
    from rich.text import Text

    from autotp_plan.runtime.verify.report import FLOAT64_TOLERANCE, error_text

    console = table_console()
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("largest error of", overflow="fold", no_wrap=True)
    for title in ("gradient", "over two passes", "value after two steps"):
        table.add_column(title, justify="right")
    for row in proof.rows():
        errors = (row.gradient, row.accumulated, row.stepped)
        wrong = any(error is not None and error > FLOAT64_TOLERANCE for error in errors)
        table.add_row(visible(row.name), *map(error_text, errors), style="red" if wrong else None)
    console.print(Text(visible(proof.headline()), style="bold"))
    console.print(table)
    for line in proof.conclusions():
        console.print(visible(line))


main.add_command(advise)
main.add_command(diff)
main.add_command(estimate)
main.add_command(export)
main.add_command(infer)
main.add_command(presets)
main.add_command(show)
main.add_command(presplit)
main.add_command(merge)
main.add_command(reshard)
main.add_command(convert)
