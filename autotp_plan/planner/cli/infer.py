"""The command that writes a spec file for a model without a preset; how its plan is inferred, in limits, and proven."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotp_plan.planner.cli.module_options import given_model, module_options
from autotp_plan.planner.cli.output import is_stdout, reported, say, say_json, write_output
from autotp_plan.schemas.errors import CompileError, Fault, MissingDependencyError

if TYPE_CHECKING:
    from autotp_plan.factories.module_factory import ModuleFactory
    from autotp_plan.schemas.plan.document import Plan

MOST_MEMORY = 4 * 2**30
"""Bytes that inference may take."""
TIMEOUT = 600
"""Seconds that it may take where the user says nothing else."""

_OTHER_LIMITS = {
    False: "give more time with --timeout, or write a spec file and give it with --spec",
    True: "write a spec file and give it with --spec",
}
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
    help="Checkpoint folder, id of the hub (org/name) or URL; or a folder with a bare config.json.",
)
@module_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Spec file to write; else it is printed.")
@time_limit
@reported
def infer(model: str | None, output: Path | None, timeout: int, factory: Callable[[], ModuleFactory | None]) -> None:
    """Infer how a model is sharded, from small models of its architecture, and write it as a spec file.

    The spec file is not proven: `compile --preset infer` proves the plan that it makes, and so does `verify`.
    """
    from autotp_plan.schemas.documents import format_json
    from autotp_plan.sources.model_folder import model_folder

    made_by = factory()
    given_model(model, made_by)
    spec = infer_with_limits(made_by or model_folder(model or "").folder, timeout)
    text = format_json(spec)
    if output is None or is_stdout(output):
        say_json(text)
        return
    write_output(output, text)
    say(f"{output}: {len(spec['layer_specs'])} rules; prove them with `autotp-plan compile --preset infer`", err=True)
    say(spec["description"], err=True)


def infer_with_limits(model: Path | ModuleFactory, timeout: float) -> dict[str, Any]:
    """The spec file that is inferred for a model, by a process that is ended when it takes too much.

    Args:
        model: a folder with a config.json, or a function that makes the model.
        timeout: seconds.

    Raises:
        OptionError: the function cannot be called.
        MismatchError: there is nothing to run its model on.
        CompileError: it took too long or too much memory, or nothing can be inferred.
        CheckpointError: transformers cannot build the model.
        MissingDependencyError: torch, transformers or accelerate is not installed.
    """
    where = str(model) if isinstance(model, Path) else f"--module {model.name}"
    missing = [name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            Fault(
                code="inference-needs-packages",
                what="inferring how a model is sharded needs packages that planning by a preset does not need",
                where=where,
                got=f"no {', '.join(missing)}",
                expected="torch, transformers and accelerate",
                next="pip install 'autotp-plan[train]'",
            )
        )
    from autotp_plan.inference.worker import MEMORY_EXIT, infer_and_watch
    from autotp_plan.runtime.verify.workers import RankError, run_ranks

    say("inferring how the model is sharded, from small models of its architecture", err=True)
    try:
        given = model.resolve() if isinstance(model, Path) else model
        (found,) = run_ranks(infer_and_watch, 1, given, MOST_MEMORY, timeout=timeout)
    except RankError as error:
        too_much = str(error).endswith(f"exit status {MEMORY_EXIT}")
        memory = f": it took more than {MOST_MEMORY / 2**30:.1f} GiB of memory" if too_much else ""
        raise CompileError(
            Fault(
                code="inference-stopped",
                what="inferring how the model is sharded was given up",
                where=where,
                got=f"{error}{memory}",
                expected=f"an answer within {timeout:.0f} s and {MOST_MEMORY >> 30} GiB",
                next=_OTHER_LIMITS[too_much],
            )
        ) from None
    spec: dict[str, Any] = found
    return spec


def prove_on_twin(plan: Plan, factory: ModuleFactory | None) -> Any:
    """Try a plan that needs proof on a twin; takes torch, transformers and DeepSpeed."""
    from autotp_plan.runtime.verify.run import try_plan

    say(f"trying a plan on a twin at TP={plan.tp_size}", err=True)
    return try_plan(plan, factory)
