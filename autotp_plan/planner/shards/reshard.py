"""From shards of one TP size straight to another: what a fresh presplit of the checkpoint would write, to the byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.planner.copying.copy_plan import stored_shards
from autotp_plan.planner.fallback.prove import Prover
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.shards.folder_writer import Notes, check_options, nobody, write_shards
from autotp_plan.planner.shards.recompile import Helpers, recompiled
from autotp_plan.planner.shards.watch import watch_shards
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.file_layout import MAX_FILE_BYTES
from autotp_plan.schemas.shards.folder import ShardsFolder, read_shards
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME, Manifest
from autotp_plan.schemas.shards.origin import original_of_shards
from autotp_plan.schemas.spec import SpecFile
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, INDEX_NAME
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.safetensors_header import parse_header, prefixed
from autotp_plan.schemas.storage.stamps import stamps_in
from autotp_plan.sources.check_checkpoint import check_checkpoint


def reshard(
    shards_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tp_size: int | None = None,
    plan: Plan | None = None,
    uneven: bool = False,
    prove: Prover | None = None,
    infer: Callable[[Any], SpecFile] | None = None,
    factory: ModuleFactory | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
    notes: Notes = nobody,
) -> Manifest:
    """Shard again, for another plan or number of ranks, what a shards folder holds; returns the new manifest.

    Args:
        shards_folder: the shards.
        output: a new folder, or one that an earlier attempt did not finish: that is resumed.
        tp_size: compile the new plan, by the rules of the old one: those that it remembers, or its preset. Give either
            this or `plan`.
        plan: the new plan, which must be for the same parameters.
        uneven: as for `compile_plan`; so are `prove`, `infer` and `factory`, which a model without a preset takes.
        prove: tries a plan on a twin: the new one, and the old one, which must come out again.
        infer: makes rules for a model.
        factory: the function that makes a model that is not from transformers.
        max_file_bytes: a rank's tensors are spread over several files when they are more than this.
        workers: reads and writes at the same time.
        progress: called with the bytes read and the bytes in all, from worker threads.
        notes: called with what a user should know, one sentence at a time.

    Raises:
        MismatchError: the plan is for another model; or none is given, and the rules of the old
            one are not known or do not make it again.
        CompileError: no plan can be made for `tp_size`, or none that is proven where that must be.
        ShardsError: the folder is not what its manifest and plan say.
        DocumentError: its manifest or plan cannot be read.
        OptionError: neither or both of `tp_size` and `plan` are given; `workers` or `max_file_bytes` is not positive.
        CheckpointError: the shards changed while they were read.
        OutputError: `output` cannot be written, the operating system stopped the command, or `output` is finished and
            the shards have changed since.
    """
    check_target(tp_size, plan)
    check_options("reshard", workers, max_file_bytes)
    output = Path(output)
    before = stamps_in(Path(shards_folder))
    shards = read_shards(Path(shards_folder))
    with _headers_only(shards) as checkpoint:
        if plan is None:
            plan = recompiled(shards.plan, checkpoint, tp_size, uneven, Helpers(prove, infer, factory))
        faults = check_plan(plan) + check_checkpoint(plan, checkpoint)
    old = {parameter.name: parameter for parameter in shards.plan.expanded()}
    faults = faults or list(_parameter_faults(old, shards.plan, plan))
    if faults:
        raise MismatchError(faults)
    sources = {parameter.name: stored_shards(old[parameter.name], shards) for parameter in plan.expanded()}
    original = original_of_shards(shards)
    manifest = write_shards(
        plan,
        original,
        sources,
        output,
        "reshard",
        max_file_bytes=max_file_bytes,
        workers=workers,
        progress=progress,
        watch=watch_shards(shards, before, "reshard", workers, progress),
        notes=notes,
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
