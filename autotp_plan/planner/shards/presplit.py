"""Splitting a checkpoint into per-rank safetensors files, as bytes: no dtype is decoded, no tensor is held in full.

Nothing of the checkpoint's tensors is lost: those that no rank reads (a head that is tied, tables that are no
parameters) are kept apart, so that `merge` gives the checkpoint back to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import overload

from autotp_plan.dequantize.computed_file import ComputedFile
from autotp_plan.planner.copying.copy_engine import FAR_CHUNK_BYTES
from autotp_plan.planner.copying.copy_plan import full_tensor, matrices_on_disk
from autotp_plan.planner.copying.source_check import Digests, Expected
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.shards.folder_writer import Notes, check_options, nobody, write_shards
from autotp_plan.planner.shards.watch import watch_checkpoint
from autotp_plan.schemas.errors import MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.file_layout import MAX_FILE_BYTES
from autotp_plan.schemas.shards.manifest import Manifest
from autotp_plan.schemas.shards.origin import Original, original_of_checkpoint
from autotp_plan.schemas.shards.parts import Part
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.checkpoint import Checkpoint, holds_tensors
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.plan_fit import checkpoint_faults
from autotp_plan.schemas.storage.stamps import stamps_in
from autotp_plan.sources.model_folder import ModelFolder, Place, model_folder, open_checkpoint
from autotp_plan.sources.torch_files.torch_view import TorchFile


@overload
def presplit(
    plan: Plan,
    checkpoint_folder: Place,
    output: str | os.PathLike[str],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
    part: None = None,
    checksum_source: bool = False,
    notes: Notes = nobody,
) -> Manifest: ...
@overload
def presplit(
    plan: Plan,
    checkpoint_folder: Place,
    output: str | os.PathLike[str],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
    part: tuple[int, int] | None = None,
    checksum_source: bool = False,
    notes: Notes = nobody,
) -> Manifest | None: ...


def presplit(
    plan: Plan,
    checkpoint_folder: Place,
    output: str | os.PathLike[str],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
    part: tuple[int, int] | None = None,
    checksum_source: bool = False,
    notes: Notes = nobody,
) -> Manifest | None:
    """Split a checkpoint by a plan into a shards folder; returns its manifest.

    Args:
        plan: the plan.
        checkpoint_folder: the checkpoint that it was compiled for: a folder, an id of the hub or a URL. From far away
            its weights are fetched once, and not stored.
        output: a new folder, or one that an earlier attempt with the same plan and checkpoint did not finish: then its
            complete files are verified and kept, and what is missing is written.
        max_file_bytes: a rank's tensors are spread over several files when they are more than this.
        workers: reads and writes at the same time.
        progress: called with the bytes read and the bytes in all, from worker threads.
        part: `(3, 8)` writes the third of eight shares of the files, of about as many bytes each. Eight processes, on
            machines that share a file system, so fill one folder; in any order, or at the same time.
        checksum_source: tell states of the checkpoint apart by every byte of its local files, and not by their sizes,
            times and inodes alone: they are read twice more, before and after.
        notes: called with what a user should know, one sentence at a time.

    Returns:
        the manifest; None when other parts are not complete yet. The process that completes the last part writes it.

    Raises:
        MismatchError: plan and checkpoint do not belong together.
        CheckpointError: the checkpoint cannot be read, or changed while it was read.
        OptionError: `workers` or `max_file_bytes` is not positive, or there is no such part.
        OutputError: `output` cannot be written, the operating system stopped the command, or `output` is finished and
            the checkpoint has changed since.
    """
    output = Path(output)
    checked = None if part is None else Part.checked(*part)
    check_options("presplit", workers, max_file_bytes)
    place = model_folder(checkpoint_folder)
    before = stamps_in(place.folder)
    checkpoint = open_checkpoint(place, plan.dequantized_dtype)
    faults = check_plan(plan) + checkpoint_faults(plan, checkpoint)
    if faults:
        raise MismatchError(faults)
    place.complete()
    original = original_of_checkpoint(checkpoint, plan)
    for note in original.notes:
        notes(note)
    watch = watch_checkpoint(
        place,
        checkpoint,
        original,
        before,
        "presplit",
        plan=plan,
        checksums=checksum_source,
        workers=workers,
        progress=progress,
    )
    sources = {
        parameter.name: (full_tensor(ByteRanges.of([checkpoint.tensors[name] for name in parameter.names_on_disk()])),)
        for parameter in plan.expanded()
    }
    matrices = {entry.name: matrices_on_disk(entry, plan.shape_of(entry)) for entry in plan.expanded()}
    return write_shards(
        plan,
        original,
        sources,
        output,
        "presplit",
        max_file_bytes=max_file_bytes,
        workers=workers,
        progress=progress,
        watch=watch,
        notes=notes,
        matrices={name: found for name, found in matrices.items() if found is not None},
        part=checked,
        digests=Digests(
            files=checkpoint.files,
            expected=tuple(_expected(place, checkpoint, original)),
            computed_from=tuple(_computed_from(place, checkpoint)) if checked is None else (),
        ),
        chunk_bytes=FAR_CHUNK_BYTES if place.elsewhere else None,
    )


def compares_all(plan: Plan, place: ModelFolder, part: tuple[int, int] | None) -> bool:
    """Whether `presplit` compares every file of `place` that the hub has a SHA-256 of."""
    return plan.dequantize is None or (part is None and holds_tensors(place.folder, place.elsewhere))


def _expected(place: ModelFolder, checkpoint: Checkpoint, original: Original) -> Iterator[Expected]:
    """What the hub says of the files that are read, where it says something."""
    for file in checkpoint.files:
        stored = file.path.file if isinstance(file.path, TorchFile) else file.path
        if stored.name in place.sha256 and not isinstance(stored, ComputedFile):
            yield Expected(name=stored.name, sha256=place.sha256[stored.name], stored=stored, described=file)
    for name, path, _ in original.copied:
        if path.name in place.sha256 and isinstance(path, Path):
            yield Expected(name=name, sha256=place.sha256[path.name], stored=path)


def _computed_from(place: ModelFolder, checkpoint: Checkpoint) -> Iterator[Expected]:
    """What the hub says of the files with quantised weights."""
    plain = {id(file) for file in checkpoint.files}
    for file in checkpoint.files_on_disk:
        if file.path.name in place.sha256 and id(file) not in plain:
            yield Expected(name=file.path.name, sha256=place.sha256[file.path.name], stored=file.path, described=file)
