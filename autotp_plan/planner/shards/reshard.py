"""From shards of one TP size straight to another: what a fresh presplit of the checkpoint would write, to the byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.rules.preset_files import AUTO
from autotp_plan.planner.shards.copy_plan import stored_shards
from autotp_plan.planner.shards.folder_writer import write_shards
from autotp_plan.schemas.errors import AutoTPError, Fault, MismatchError, OptionError
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.plan.rule_ref import Origin
from autotp_plan.schemas.shards.file_layout import MAX_FILE_BYTES
from autotp_plan.schemas.shards.folder import ShardsFolder, read_shards
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME, Manifest
from autotp_plan.schemas.shards.origin import original_of_shards
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.safetensors_header import parse_header, prefixed
from autotp_plan.sources.check_checkpoint import check_checkpoint


def reshard(
    shards_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tp_size: int | None = None,
    plan: Plan | None = None,
    uneven: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
) -> Manifest:
    """Shard again, for another plan or number of ranks, what a shards folder holds; returns the new manifest.

    Args:
        shards_folder: the shards.
        output: a new folder, or one that an earlier attempt did not finish: that is resumed.
        tp_size: compile the plan that a preset makes of the same checkpoint. Give either this or `plan`.
        plan: the new plan, which must be for the same parameters.
        uneven: as for `compile_plan`.
        max_file_bytes: a rank's tensors are spread over several files when they are more than this.
        workers: reads and writes at the same time.
        progress: called with the bytes read and the bytes in all, from worker threads.

    Raises:
        MismatchError: the plan is for another model; or the old one was not made by a preset alone and none is given.
        CompileError: no plan can be made for `tp_size`.
        ShardsError: the folder is not what its manifest and plan say.
        DocumentError: its manifest or plan cannot be read.
        OptionError: neither or both of `tp_size` and `plan` are given; `workers` or `max_file_bytes` is not positive.
        OutputError: `output` cannot be written, or the operating system stopped the command.
    """
    check_target(tp_size, plan)
    output = Path(output)
    shards = read_shards(Path(shards_folder))
    with _headers_only(shards) as checkpoint:
        if plan is None:
            plan = _recompiled(shards.plan, checkpoint, tp_size, uneven)
        faults = check_plan(plan) + check_checkpoint(plan, checkpoint)
    old = {parameter.name: parameter for parameter in shards.plan.expanded()}
    faults = faults or list(_parameter_faults(old, shards.plan, plan))
    if faults:
        raise MismatchError(faults)
    sources = {parameter.name: stored_shards(old[parameter.name], shards) for parameter in plan.expanded()}
    original = original_of_shards(shards)
    manifest = write_shards(
        plan, original, sources, output, "reshard", max_file_bytes=max_file_bytes, workers=workers, progress=progress
    )
    assert manifest is not None, "only a part has none"
    return manifest


def check_target(tp_size: int | None, plan: Plan | Path | None) -> None:
    """Raise OptionError unless exactly one of the two ways to say what to shard for is given."""
    if (tp_size is None) == (plan is None):
        raise OptionError(
            Fault(
                code="tp-or-plan",
                what="reshard needs a number of ranks or a plan",
                where="--tp",
                got="neither" if tp_size is None else "both",
                expected="either --tp or --plan",
                next="give --tp N for the plan of the same preset, or --plan FILE for another one",
            )
        )


@contextlib.contextmanager
def _headers_only(shards: ShardsFolder) -> Iterator[Path]:
    """A folder like the original checkpoint: its names, headers and config; tensors are holes that take no space.

    A head that is not tied has one byte that the embedding has not: by its values it is known not to be tied.
    """
    heads = {name for entry in shards.plan.expanded() if entry.gather_output for name in entry.names_on_disk()}
    with tempfile.TemporaryDirectory(prefix="autotp-plan-") as name:
        folder = Path(name)
        for file in shards.manifest.source.files:
            header = parse_header(folder / file.name, file.header)
            path = folder / file.name
            path.write_bytes(prefixed(file.header.encode()))
            os.truncate(path, header.size)
            for tensor in header.tensors:
                if tensor.name in heads:
                    with path.open("r+b") as opened:
                        opened.seek(tensor.start)
                        opened.write(b"\1")
        for copied, original in ((CONFIG_NAME, CONFIG_NAME), (INDEX_COPY_NAME, INDEX_NAME)):
            if any(file.name == copied for file in shards.manifest.files):
                shutil.copyfile(shards.path / copied, folder / original)
        yield folder


def _recompiled(old: Plan, checkpoint: Path, tp_size: int | None, uneven: bool) -> Plan:
    """The plan for `tp_size` by the rules that made the old one: those with which it comes out as it was."""
    rules = {entry.rule for entry in old.parameters} | {tie.rule for tie in old.tied}
    named = {rule.name for rule in rules if rule.origin is Origin.PRESET}
    for preset in (AUTO, *sorted(named)):
        for was_uneven in (False, True):
            try:
                again = compile_plan(checkpoint, tp_size=old.tp_size, preset=preset, uneven=was_uneven)
            except AutoTPError:
                continue
            if again.fingerprint == old.fingerprint:
                return compile_plan(checkpoint, tp_size=tp_size, preset=preset, uneven=uneven or was_uneven)
    others = sorted(str(rule) for rule in rules if rule.origin not in (Origin.PRESET, Origin.DEFAULT))
    raise MismatchError(
        Fault(
            code="plan-not-of-a-preset",
            what="the plan of the shards cannot be made again for another TP size",
            where="--tp",
            got=", ".join(others[:3]) or "a plan that the preset of this version does not make",
            expected="a plan that a preset made, and nothing else",
            next=f"compile a plan with the same rules and --tp {tp_size}, and give it with --plan",
        )
    )


def _parameter_faults(old: dict[str, Parameter], old_plan: Plan, plan: Plan) -> Iterator[Fault]:
    """Parameters of `plan` that the shards do not hold, or with another dtype, shape or name on disk."""
    new = {parameter.name: parameter for parameter in plan.expanded()}
    for name in sorted(old.keys() | new.keys()):
        before = _described(old.get(name), old_plan)
        after = _described(new.get(name), plan)
        if before != after:
            yield Fault(
                code="plan-of-other-parameters",
                what="the plan is for other parameters than the shards hold",
                where=name,
                got=after,
                expected=before,
                next="give a plan for the same model; or `merge` the shards, and presplit the checkpoint",
            )


def _described(parameter: Parameter | None, plan: Plan) -> str:
    if parameter is None:
        return "no such parameter"
    names = parameter.names_on_disk()
    shown = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}, {len(names)} tensors"
    return f"{parameter.dtype} of {list(plan.shape_of(parameter))}, on disk {shown}"
