"""Resuming a job from a checkpoint that `job.py` saved.

Nothing is changed before all ranks have found it sound and theirs. On the same mesh a job continues exactly as it would
have; on a different one (`mesh_change.py`) it gets new random seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from autotp_plan.runtime.checkpoint.job_state import (
    about_engine,
    batches_before,
    check_tag,
    data_source,
    differences_of,
)
from autotp_plan.runtime.checkpoint.mesh_change import load_from_other_mesh, model_differences
from autotp_plan.runtime.checkpoint.rng_state import read_rng_state, restore_rng_state, seed_from_rng_state
from autotp_plan.runtime.checkpoint.zero_files import SavedJob
from autotp_plan.runtime.data.stream import StreamLoader
from autotp_plan.runtime.deepspeed.agreement import check_same, gathered, in_step, together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.job_files import check_is_data, loads_data_only, read_saved
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import model_states_file, optimizer_states_files
from autotp_plan.schemas.documents import fingerprint
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, DocumentError, Fault, MismatchError
from autotp_plan.schemas.jobs.job_folder import file_faults, latest, missing_files, or_newest_sound
from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME, LATEST_NAME, PLAN_NAME, JobManifest
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.without_stream import differ_in_stream_alone

_NOT_READ, _READ_AGAIN = "the checkpoint could not be read", "correct what is wrong, or resume from another tag"


def load_checkpoint(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None, trust: bool = False
) -> dict[str, Any]:
    """Resume `engine` from `folder/tag`; every rank calls it.

    Also restores the random state, and the position of the loader that `initialize` made. On a different mesh, or by
    another plan of the same model, the random number generators are seeded anew; a plan that shards the stream along
    the sequence, where the other does not, is no other one.

    Args:
        engine: the DeepSpeed engine, as `initialize` made it.
        folder: the folder of all checkpoints of the job.
        plan: the plan that the model is sharded by.
        ranks: this process's place in the mesh.
        tag: which checkpoint; None for the latest.
        trust: unpickle its files, whatever they hold.

    Returns:
        The client state that was saved.

    Raises:
        CheckpointError: there is no complete checkpoint, or it cannot be read.
        MismatchError: it is of another model, or can be resumed only on the mesh it was saved on.
        MissingDependencyError: this version of DeepSpeed keeps its state where it is not looked for.
    """
    check_all_call("plan.load_checkpoint")
    asked = tag
    try:
        tag, about, job, differs = together(
            lambda: _what_to_load(engine, folder, plan, ranks, asked, trust), _NOT_READ, _READ_AGAIN
        )
        check_same(
            {"tag": tag, "checkpoint": fingerprint(about.to_json()), "plan": plan.fingerprint},
            what="the ranks would not resume from one checkpoint",
            where=f"load_checkpoint from {folder}",
            next_step="give every rank the same tag, and the folder that the job was saved to",
        )
        share = _share(folder / tag)
        together(lambda: _check_bytes(folder / tag, about, share), _NOT_READ, _READ_AGAIN)
    except (CheckpointError, DocumentError) as error:
        raise _with_another(error, folder, asked) from None
    if not trust:
        together(lambda: _check_is_data(folder / tag, share), _NOT_READ, _READ_AGAIN)
    streams = folder / tag / f"random-{0 if differs else dist.get_rank()}.safetensors"
    state = together(lambda: read_rng_state(streams), _NOT_READ, _READ_AGAIN)
    restore = partial(seed_from_rng_state, state, ranks.dp_rank) if differs else partial(restore_rng_state, state)
    held: Any = None
    if job is None:  # without ZeRO, what DeepSpeed saves does not depend on the number of DP ranks
        held = together(lambda: _read_files(engine, folder / tag, ranks, trust), _NOT_READ, _READ_AGAIN)

    def load() -> dict[str, Any]:
        if job is not None:
            return load_from_other_mesh(engine, job, plan, ranks)
        with loads_data_only(engine, trust, held):
            found: dict[str, Any] = engine.load_checkpoint(str(folder), tag=tag)[1]
            return found

    client_state = in_step(load, _NOT_READ, _READ_AGAIN)
    together(restore, _NOT_READ, _READ_AGAIN)
    together(lambda: _set_position(engine, about, ranks, restore), _NOT_READ, _READ_AGAIN)
    check_same(
        {"step": str(engine.global_steps), "samples": str(engine.global_samples)},
        what="the ranks would go on at different steps",
        where=str(folder / tag),
        next_step="start the job anew from another tag: this one holds files of two saves",
    )
    return {key: value for key, value in client_state.items() if key in about.client_state}


def _what_to_load(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None, trust: bool
) -> tuple[str, JobManifest, SavedJob | None, bool]:
    """The tag, what is written about it, its files where DeepSpeed cannot load them here, and whether it differs."""
    tag = tag if tag is not None else latest(folder)
    if tag is not None:
        check_tag(tag, folder)
    if tag is None or not (folder / tag / ABOUT_NAME).exists():
        raise CheckpointError(
            Fault(
                what="there is no complete checkpoint",
                where=str(folder if tag is None else folder / tag),
                got="no file " + (LATEST_NAME if tag is None else ABOUT_NAME),
                expected="a folder that save_checkpoint wrote",
                next="give the folder, or start from the shards",
            )
        )
    about = JobManifest.read(folder / tag)
    missing = list(missing_files(folder / tag, about))
    if missing:
        raise CheckpointError(missing)
    _check_position(engine, about, ranks, folder / tag)
    differences = differences_of(about, about_engine(engine, plan, ranks))
    if "plan" in differences and differ_in_stream_alone(Plan.read(folder / tag / PLAN_NAME), plan):
        differences.remove("plan")  # the ranks hold the same of everything
    if differences and (differences != ["dp_size"] or engine.zero_optimization_stage() > 0):
        return tag, about, _saved_job(engine, folder / tag, about, plan, ranks, trust), True
    return tag, about, None, bool(differences)


def _share(tag_folder: Path) -> slice:
    """Which of its files this rank checks: the ranks that see the same folder share them.

    On hosts that have copies of their own, a file with one name has another number (inode) or time on each.
    """

    def identity() -> tuple[int, int]:
        found = (tag_folder / ABOUT_NAME).stat()
        return found.st_ino, found.st_mtime_ns

    everyone = gathered(identity, _NOT_READ, _READ_AGAIN)
    mine = [rank for rank, one in enumerate(everyone) if one == everyone[dist.get_rank()]]
    return slice(mine.index(dist.get_rank()), None, len(mine))


def _check_bytes(tag_folder: Path, about: JobManifest, share: slice) -> None:
    """Compare the bytes of this rank's share of the files with their checksums."""
    faults = list(file_faults(tag_folder, about.files[share]))
    if faults:
        raise CheckpointError(faults)


def _check_is_data(tag_folder: Path, share: slice) -> None:
    """Look for code in this rank's share of the files."""
    for path in sorted(tag_folder.rglob("*.pt"))[share]:
        check_is_data(path)


def _read_files(engine: Any, tag_folder: Path, ranks: Ranks, trust: bool) -> dict[Path, Any]:
    """What the engine reads on this rank: a read that fails in its midst would leave the other ranks waiting.

    Of the first TP rank's file it uses a number alone: its tensors are not read.
    """
    stage = engine.zero_optimization_stage()
    first = tag_folder / model_states_file(stage, 0, ranks.dp_rank)
    own = model_states_file(stage, ranks.tp_rank, ranks.dp_rank)
    paths = [tag_folder / name for name in (own, *optimizer_states_files(ranks.tp_rank, ranks.dp_rank))]
    held = {path: read_saved(path, trust=trust) for path in paths if path.exists()}
    return held if first in held else {first: read_saved(first, trust=trust, map_location="meta"), **held}


def _with_another(error: AutoTPError, folder: Path, asked: str | None) -> AutoTPError:
    """An error of a checkpoint that cannot be read, with the newest one that can as the next step."""
    return gathered(lambda: or_newest_sound(error, folder, asked) if dist.get_rank() == 0 else error, _NOT_READ)[0]


def _set_position(engine: Any, about: JobManifest, ranks: Ranks, restore: Callable[[], None]) -> None:
    """Let the loader that `initialize` made continue with the sample after the last that was trained on."""
    source = data_source(engine)
    if source is not None and about.position is not None:
        epoch, samples = about.position
        source.set_position(epoch, samples // ranks.dp_size, restore, batches_before(engine, ranks))


def _check_position(engine: Any, about: JobManifest, ranks: Ranks, folder: Path) -> None:
    """A stream can be resumed where each DP rank's position in it follows from that of the saved job."""
    source = data_source(engine)
    if not isinstance(source, StreamLoader) or about.position is None:
        return
    _, samples = about.position
    reason = source.why_not_from(samples // ranks.dp_size, about.dp_size == ranks.dp_size)
    if samples % ranks.dp_size or reason:
        raise MismatchError(
            Fault(
                what="the stream of data cannot be resumed here",
                where=f"{folder}: position",
                got=reason or f"{samples} samples, which {ranks.dp_size} DP ranks do not divide",
                expected=f"{about.dp_size} DP ranks and the batch size of the saved job",
                next="resume on as many DP ranks; or initialize without training_data, and read the stream yourself",
            )
        )


def _saved_job(engine: Any, folder: Path, about: JobManifest, plan: Plan, ranks: Ranks, trust: bool) -> SavedJob:
    """What was saved. Raises MismatchError when it cannot be resumed here, before anything is changed."""
    wanted = about_engine(engine, plan, ranks)
    saved_plan = Plan.read(folder / PLAN_NAME)
    faults = model_differences(saved_plan, plan)
    reason = about.this_mesh_only or wanted.this_mesh_only
    if not faults and reason:
        faults = [
            Fault(
                what="the checkpoint can be resumed only on the mesh it was saved on",
                where=f"{folder}: {key}",
                got=str(getattr(about, key)),
                expected=str(getattr(wanted, key)),
                next=f"resume on the mesh it was saved on: {reason}",
            )
            for key in differences_of(about, wanted)
        ]
    if faults:
        raise MismatchError(faults)
    return SavedJob(folder, saved_plan, about.dp_size, about.zero_stage, trust)
