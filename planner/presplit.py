"""Cutting a checkpoint into per-rank safetensors files, as bytes: no dtype is decoded, no tensor is held whole.

Nothing of the checkpoint's tensors is lost: those that no rank reads (a head that is tied, tables that are no
parameters) are kept apart, so that `merge` gives the checkpoint back to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from autotp_plan.planner.byte_runs import whole
from autotp_plan.planner.check import check_checkpoint, check_plan
from autotp_plan.planner.original import source_of
from autotp_plan.planner.output_folder import Progress
from autotp_plan.planner.shard_files import MAX_FILE_BYTES, Contents, Unused, stopped, write_shards
from autotp_plan.schemas.checkpoint import INDEX_NAME, Checkpoint, read_checkpoint
from autotp_plan.schemas.errors import MismatchError, ShardsError
from autotp_plan.schemas.manifest import (
    INDEX_COPY_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
)
from autotp_plan.schemas.plan import Parameter, Plan
from autotp_plan.schemas.segments import Segments

MAX_COPIED_BYTES = 256 * 1024 * 1024
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".pkl", ".pickle", ".joblib")
_OURS = (MANIFEST_NAME, PLAN_NAME, INDEX_COPY_NAME)


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
            source=source_of(checkpoint),
            read_from=lambda parameter: (whole(_segments(parameter, checkpoint)),),
            unused=_unused(plan, checkpoint),
            copied=list(_copied(checkpoint_folder)),
        )
    except OSError as error:
        raise ShardsError(stopped(checkpoint_folder, "presplit", error)) from error
    return write_shards(
        plan, contents, output, "presplit", max_file_bytes=max_file_bytes, workers=workers, progress=progress
    )


def _segments(parameter: Parameter, checkpoint: Checkpoint) -> Segments:
    return Segments.of(parameter.name, [checkpoint.tensors[name] for name in parameter.names_on_disk()])


def _unused(plan: Plan, checkpoint: Checkpoint) -> list[Unused]:
    used = {name for parameter in plan.expanded() for name in parameter.names_on_disk()}
    return [
        Unused(shape=tensor.shape, source=Segments.of(tensor.name, [tensor]))
        for file in checkpoint.files
        for tensor in file.tensors
        if tensor.name not in used
    ]


def _copied(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Config, tokenizer and generation files: all small files beside the weights, in name order; and the index."""
    if (folder / INDEX_NAME).exists():
        yield INDEX_COPY_NAME, folder / INDEX_NAME, (folder / INDEX_NAME).stat().st_size
    for path in sorted(folder.iterdir()):
        left_out = path.suffix in _WEIGHTS or path.name.endswith(".index.json") or path.name in _OURS
        hidden = path.name.startswith(".") or not path.name.isprintable() or "\\" in path.name
        if not left_out and not hidden and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            yield path.name, path, path.stat().st_size
