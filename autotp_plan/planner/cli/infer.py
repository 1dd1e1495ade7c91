"""The command that writes a spec file for a model without a preset, and the limits under which it is inferred."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from autotp_plan.planner.cli.output import not_written, reported
from autotp_plan.schemas.errors import CompileError, Fault, MissingDependencyError, OutputError

MOST_MEMORY = 4 * 2**30
"""Bytes that inference may take."""
TIMEOUT = 600
"""Seconds that it may take where the user says nothing else."""

time_limit = click.option(
    "--timeout",
    type=click.IntRange(min=1),
    default=TIMEOUT,
    show_default=True,
    help="Seconds after which inferring rules is given up.",
)


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    help="Checkpoint folder, or a folder with a bare config.json.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Spec file to write; else it is printed.")
@time_limit
@reported
def infer(model: Path, output: Path | None, timeout: int) -> None:
    """Infer how a model is sharded, from small models of its architecture, and write it as a spec file.

    The spec file is not proven: `compile --preset infer` proves the plan that it makes, and so does `verify`.
    """
    from autotp_plan.schemas.documents import format_json, write_atomically

    spec = infer_with_limits(model, timeout)
    text = format_json(spec)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise OutputError(not_written(output, error)) from None
    click.echo(
        f"{output}: {len(spec['layer_specs'])} rules; prove them with `autotp-plan compile --preset infer`", err=True
    )
    click.echo(spec["description"], err=True)


def infer_with_limits(model: Path, timeout: float) -> dict[str, Any]:
    """The spec file that is inferred for a model, by a process that is ended when it takes too much.

    Args:
        model: a folder with a config.json.
        timeout: seconds.

    Raises:
        CompileError: it took too long or too much memory, or nothing can be inferred.
        CheckpointError: transformers cannot build the model.
        MissingDependencyError: torch, transformers or accelerate is not installed.
    """
    missing = [name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            Fault(
                code="inference-needs-packages",
                what="inferring how a model is sharded needs packages that planning by a preset does not need",
                where=str(model),
                got=f"no {', '.join(missing)}",
                expected="torch, transformers and accelerate",
                next="pip install 'autotp-plan[train]'",
            )
        )
    from autotp_plan.inference.worker import infer_and_watch
    from autotp_plan.runtime.verify.workers import RankError, run_ranks

    click.echo("inferring how the model is sharded, from small models of its architecture", err=True)
    try:
        (found,) = run_ranks(infer_and_watch, 1, model.resolve(), MOST_MEMORY, timeout=timeout)
    except RankError as error:
        raise CompileError(
            Fault(
                code="inference-stopped",
                what="inferring how the model is sharded was given up",
                where=str(model),
                got=str(error),
                expected=f"an answer within {timeout:.0f} s and {MOST_MEMORY >> 30} GiB",
                next="give more time with --timeout, or write a spec file and give it with --spec",
            )
        ) from None
    spec: dict[str, Any] = found
    return spec
