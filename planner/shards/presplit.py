"""Cutting a checkpoint into per-rank safetensors files, as bytes: no dtype is decoded, no tensor is held whole.

Nothing of the checkpoint's tensors is lost: those that no rank reads (a head that is tied, tables that are no
parameters) are kept apart, so that `merge` gives the checkpoint back to the byte.
"""

from __future__ import annotations

from pathlib import Path

from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.shards.copy_plan import whole
from autotp_plan.planner.shards.folder_writer import Contents, stopped, write_shards
from autotp_plan.planner.shards.resumable_folder import Progress
from autotp_plan.schemas.errors import MismatchError, ShardsError
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.file_layout import MAX_FILE_BYTES
from autotp_plan.schemas.shards.manifest import Manifest
from autotp_plan.schemas.shards.origin import original_of_checkpoint
from autotp_plan.schemas.storage.byte_ranges import Segments
from autotp_plan.schemas.storage.checkpoint import Checkpoint, read_checkpoint
from autotp_plan.schemas.storage.plan_fit import check_checkpoint


def presplit(
    plan: Plan,
    checkpoint_folder: Path,
    output: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
) -> Manifest:
    """Cut the checkpoint in `checkpoint_folder` by `plan` into the folder `output`; returns its manifest.

    Args:
        output: a new folder, or one that an earlier attempt with the same plan and checkpoint did not finish: then its
            complete files are verified and kept, and what is missing is written.
        max_file_bytes: a rank's tensors are spread over several files when they are more than this.
        workers: reads and writes at the same time.
        progress: called as source bytes are cut, from worker threads.

    Raises MismatchError when plan and checkpoint do not belong together, ShardsError when `output` cannot be written.
    """
    faults = check_plan(plan) + check_checkpoint(plan, checkpoint_folder)
    if faults:
        raise MismatchError(faults)
    checkpoint = read_checkpoint(checkpoint_folder)
    try:
        contents = Contents(
            original=original_of_checkpoint(checkpoint, plan),
            read_from=lambda parameter: (whole(_segments(parameter, checkpoint)),),
        )
    except OSError as error:
        raise ShardsError(stopped(checkpoint_folder, "presplit", error)) from error
    return write_shards(
        plan, contents, output, "presplit", max_file_bytes=max_file_bytes, workers=workers, progress=progress
    )


def _segments(parameter: Parameter, checkpoint: Checkpoint) -> Segments:
    return Segments.of(parameter.name, [checkpoint.tensors[name] for name in parameter.names_on_disk()])
