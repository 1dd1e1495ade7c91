"""The commands that write and read shards: presplit, merge, reshard, and `check` of a shards folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotp_plan.planner.cli.infer import TIMEOUT, infer_with_limits, prove_on_twin, time_limit
from autotp_plan.planner.cli.module_options import module_options
from autotp_plan.planner.cli.output import progress, reported, say

if TYPE_CHECKING:
    from autotp_plan.factories.module_factory import ModuleFactory
    from autotp_plan.schemas.shards.folder import ShardsFolder
    from autotp_plan.schemas.shards.manifest import Manifest

_FILE = click.Path(path_type=Path)
_WORKERS = click.option("--workers", type=int, default=4, show_default=True, help="Reads and writes at the same time.")
_QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_FILE)
@click.option(
    "--checkpoint", required=True, help="The checkpoint to shard: a folder, an id of the hub (org/name) or a URL."
)
@click.option("-o", "--output", type=_FILE, required=True, help="New folder for the shards, or one to continue.")
@click.option("--part", metavar="K/N", help="Write the K-th of N shares of the files; each may run on another machine.")
@click.option(
    "--checksum-source",
    is_flag=True,
    help="Notice by every byte that the checkpoint changed, and not by sizes, times and inodes alone.",
)
@_WORKERS
@_QUIET
@reported
def presplit(
    plan_file: Path,
    checkpoint: str,
    output: Path,
    part: str | None,
    workers: int,
    quiet: bool,
    checksum_source: bool = False,
) -> None:
    """Write a checkpoint as a folder of per-rank shards that needs nothing else to train from.

    Stopped at any moment, the same command continues with the files that are missing. With --part several machines
    write one folder; the one that completes the last part finishes it.
    """
    from autotp_plan.planner.shards.presplit import compares_all
    from autotp_plan.planner.shards.presplit import presplit as run
    from autotp_plan.schemas.plan.document import Plan
    from autotp_plan.schemas.shards.parts import Part, find_parts
    from autotp_plan.sources.model_folder import model_folder

    plan = Plan.read(plan_file)
    place = model_folder(checkpoint)
    share = None if part is None else dataclasses.astuple(Part.parse(part))
    started = time.monotonic()
    with progress("presplit", quiet) as shown:
        manifest = run(
            plan,
            place,
            output,
            workers=workers,
            progress=shown,
            part=share,
            checksum_source=checksum_source,
            notes=_noted(quiet),
        )
    if place.sha256 and not compares_all(plan, place, share):
        say(
            "note: quantised weights were not compared with the hub's SHA-256 (without --part they are; .bin never)",
            err=True,
        )
    if manifest is not None:
        _report(manifest, output, started, quiet)
    elif not quiet:
        say(f"{output}: part {part} in {time.monotonic() - started:.1f} s; {find_parts(output) or 'finished'}")


@click.command()
@click.argument("shards", metavar="SHARDS", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="New folder for the checkpoint, or one to continue.")
@_WORKERS
@_QUIET
@reported
def merge(shards: Path, output: Path, workers: int, quiet: bool) -> None:
    """Write the checkpoint that shards were made from: the same files, to the byte; of .bin files their safetensors.

    Of weights that were quantised, the checkpoint that has them in the dtype of the shards.
    """
    from autotp_plan.planner.plan_table import human_bytes
    from autotp_plan.planner.shards.merge import converted_from
    from autotp_plan.planner.shards.merge import merge as run
    from autotp_plan.schemas.names import some
    from autotp_plan.schemas.shards.folder import read_shards

    started = time.monotonic()
    with progress("merge", quiet) as shown:
        size = run(shards, output, workers=workers, progress=shown, notes=_noted(quiet))
    if not quiet:
        folder = read_shards(shards)
        quantized, torch_files = folder.plan.dequantize, converted_from(folder)
        say(f"{output}: the checkpoint, {human_bytes(size)} in {time.monotonic() - started:.1f} s")
        if quantized is not None:
            say(f"{output}: written in {quantized.dtype}; the original's weights are {quantized.method}")
        if torch_files:
            say(f"{output}: written as safetensors; the original was {some(torch_files, 2)}")


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "--output", type=_FILE, required=True, help="New folder for the checkpoint, or one to continue.")
@_WORKERS
@_QUIET
@reported
def convert(checkpoint: str, output: Path, workers: int, quiet: bool) -> None:
    """Write a checkpoint of .bin files (pytorch_model.bin) as safetensors, without running what is in them.

    `compile`, `presplit` and training read .bin files as they are: this is for other programs. Stopped at any moment,
    the same command continues with the files that are missing.
    """
    from autotp_plan.planner.plan_table import human_bytes
    from autotp_plan.planner.shards.convert import convert as run

    started = time.monotonic()
    with progress("convert", quiet) as shown:
        size = run(checkpoint, output, workers=workers, progress=shown, notes=_noted(quiet))
    if not quiet:
        say(f"{output}: safetensors, {human_bytes(size)} in {time.monotonic() - started:.1f} s")


@click.command()
@click.argument("shards", metavar="SHARDS", type=_FILE)
@click.option("--tp", "tp_size", type=int, help="New number of ranks; the plan is made by the same rules.")
@click.option(
    "--plan",
    "plan_file",
    type=_FILE,
    help="Plan to shard by, where the rules of the old one are not known, or others are meant.",
)
@click.option("--uneven", is_flag=True, help="With --tp: ranks get shards of unequal size where it does not divide.")
@click.option("-o", "--output", type=_FILE, required=True, help="New folder for the shards, or one to continue.")
@module_options
@time_limit
@_WORKERS
@_QUIET
@reported
def reshard(
    shards: Path,
    tp_size: int | None,
    plan_file: Path | None,
    uneven: bool,
    output: Path,
    workers: int,
    quiet: bool,
    factory: Callable[[], ModuleFactory | None] = lambda: None,
    timeout: int = TIMEOUT,
) -> None:
    """Write shards for another number of ranks: what presplit would write from the original checkpoint.

    With --tp the plan is compiled by the rules of the old one, and proven where `compile` proves.
    """
    from autotp_plan.planner.shards.reshard import check_target
    from autotp_plan.planner.shards.reshard import reshard as run
    from autotp_plan.schemas.plan.document import Plan
    from autotp_plan.schemas.spec import SpecFile

    check_target(tp_size, plan_file)
    made_by = factory()
    plan = None if plan_file is None else Plan.read(plan_file)
    started = time.monotonic()
    with progress("reshard", quiet) as shown:
        manifest = run(
            shards,
            output,
            tp_size=tp_size,
            plan=plan,
            uneven=uneven,
            prove=lambda plan: prove_on_twin(plan, made_by),
            infer=lambda given: SpecFile.from_dict(infer_with_limits(given, timeout)),
            factory=made_by,
            workers=workers,
            progress=shown,
            notes=_noted(quiet),
        )
    _report(manifest, output, started, quiet)


def check_shards(folder: Path) -> ShardsFolder:
    """Verify every byte of a shards folder, and say so."""
    from autotp_plan.planner.plan_table import human_bytes
    from autotp_plan.planner.shards.merge import check_shards as run

    with progress("check", False) as shown:
        shards = run(folder, progress=shown)
    size = sum(file.size for file in shards.manifest.files)
    files = f"{len(shards.manifest.files)} files, {human_bytes(size)} for {shards.plan.tp_size} ranks"
    say(f"{folder}: sound, every checksum is right ({files})")
    return shards


def check_against(shards: ShardsFolder, checkpoint: str) -> None:
    """Compare shards with a checkpoint, byte by byte, and say so."""
    from autotp_plan.planner.plan_table import human_bytes
    from autotp_plan.planner.shards.same_checkpoint import check_same_checkpoint

    with progress("compare", False) as shown:
        found = check_same_checkpoint(shards, checkpoint, progress=shown)
    compared = f"{found.tensors} tensors and {found.small_files} small files, {human_bytes(found.size)}"
    say(f"{shards.path}: every byte is that of {checkpoint} ({compared})")


def _noted(quiet: bool) -> Callable[[str], None]:
    """Shows a note on stderr, unless `quiet`."""
    return lambda note: None if quiet else say(f"note: {note}", err=True)


def _report(manifest: Manifest, output: Path, started: float, quiet: bool) -> None:
    if not quiet:
        from autotp_plan.planner.plan_table import human_bytes

        size = human_bytes(sum(file.size for file in manifest.files))
        seconds = f"{time.monotonic() - started:.1f} s"
        say(f"{output}: {len(manifest.files)} files, {size} for {manifest.tp_size} ranks in {seconds}")
