"""Checkpoints of a running job: what DeepSpeed saves, and what it leaves out.

DeepSpeed saves weights, optimizer and scheduler. Next to them are written the random state of every rank, how much
data was consumed, and which plan and mesh it was. Resumed on the same mesh, a job continues exactly as it would have;
on a different one (`mesh_change.py`) it gets new random seeds. The file `latest` names the checkpoint to resume from;
it is written when all ranks are done, so a save that dies is not chosen.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from autotp_plan.runtime.checkpoint.mesh_change import load_from_other_mesh, model_differences, why_this_mesh_only
from autotp_plan.runtime.checkpoint.rng_state import load_rng_state, save_rng_state, seed_from_rng_state
from autotp_plan.runtime.checkpoint.zero_files import SavedJob
from autotp_plan.runtime.data.sampler import ResumableSampler
from autotp_plan.runtime.data.stream import StreamLoader
from autotp_plan.runtime.deepspeed.agreement import check_same, gathered, together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.job_files import check_is_data, collected_saves, loads_data_only
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.documents import fingerprint, sync_folder, write_atomically
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, DocumentError, Fault, MismatchError, OptionError
from autotp_plan.schemas.jobs.job_folder import (
    file_faults,
    latest,
    missing_files,
    or_newest_sound,
    remove_older,
    sealed,
)
from autotp_plan.schemas.jobs.job_lock import claim
from autotp_plan.schemas.jobs.job_manifest import (
    ABOUT_NAME,
    LATEST_NAME,
    PLAN_NAME,
    UNFINISHED_NAME,
    JobFile,
    JobManifest,
)
from autotp_plan.schemas.plan.document import Plan

_FAILED = "the checkpoint could not be written"
_NOT_READ, _READ_AGAIN = "the checkpoint could not be read", "correct what is wrong, or resume from another tag"


def save_checkpoint(
    engine: Any,
    folder: Path,
    plan: Plan,
    ranks: Ranks,
    tag: str | None,
    client_state: dict[str, Any],
    keep_last: int | None = None,
    take_over: bool = False,
) -> str:
    """Save `engine` to `folder/tag` and make it the latest; every rank calls it, right after an optimizer step.

    Args:
        engine: the DeepSpeed engine.
        folder: the folder of all checkpoints of the job.
        plan: the plan that the model is sharded by.
        ranks: this process's place in the mesh.
        tag: name of the folder to write; None for the number of the step.
        client_state: what the caller wants back when the job resumes.
        keep_last: remove older checkpoints than so many, when this one is the latest; None keeps all.
        take_over: write although another job may: the one that the lock names has ended.

    Returns:
        The tag.

    Raises:
        MismatchError: gradients have been accumulated since the last optimizer step; or not every rank calls it.
        CheckpointError: the tag is not the name of a folder, or names anything but what an unfinished save has left.
    """
    tag = tag if tag is not None else f"step{engine.global_steps}"
    check_all_call("plan.save_checkpoint")
    about = together(lambda: _about_a_save(engine, folder, plan, ranks, tag, client_state, keep_last), _FAILED)
    check_same(
        {"tag": tag, "plan": plan.fingerprint, "latest": latest(folder)},
        what="the ranks would not save one checkpoint",
        where=f"save_checkpoint to {folder}",
        next_step="give every rank the same tag and a folder that all of them share",
    )
    target = folder / tag
    together(lambda: _begin(target, take_over) if dist.get_rank() == 0 else None, _FAILED)
    together(lambda: _check_shared(target), _FAILED)
    with collected_saves(engine) as saves:
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    files = gathered(lambda: _finish_part(target, saves), _FAILED)
    together(lambda: _finish(target, plan, about, files, keep_last) if dist.get_rank() == 0 else None, _FAILED)
    return tag


def _about_a_save(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str, client_state: dict[str, Any], keep_last: int | None
) -> JobManifest:
    """What is written about a checkpoint, when it may be made."""
    about = dataclasses.replace(_about(engine, plan, ranks), client_state=tuple(sorted(client_state)))
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise MismatchError(
            Fault(
                what="gradients that are accumulated in part cannot be saved",
                where=str(folder / tag),
                got=f"{engine.micro_steps % engine.gradient_accumulation_steps()} backward passes since the last step",
                expected="to be called right after an optimizer step",
                next="save where engine.is_gradient_accumulation_boundary() was true",
            )
        )
    _check_tag(tag, folder)
    if keep_last is not None and keep_last < 1:
        raise OptionError(
            Fault(
                code="keep-last",
                what="no checkpoint would be kept",
                where="save_checkpoint: keep_last",
                got=str(keep_last),
                expected="at least 1",
                next="give a positive number, or leave it out to keep all",
            )
        )
    target = folder / tag
    if target.exists() and (latest(folder) == tag or not (target / UNFINISHED_NAME).exists()):
        raise CheckpointError(
            Fault(
                what="something would be overwritten",
                where=str(target),
                got="a folder or file that no unfinished save has left",
                expected="another tag for each checkpoint",
                next="give another tag, or remove it yourself",
            )
        )
    return about


def _begin(target: Path, take_over: bool) -> None:
    claim(target.parent, take_over=take_over)
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for folder in (target.parent.parent, target.parent):
        sync_folder(folder)
    (target / UNFINISHED_NAME).touch()


def _check_shared(target: Path) -> None:
    """Every rank must see what the first one has made."""
    if not (target / UNFINISHED_NAME).exists():
        raise CheckpointError(
            Fault(
                what="the ranks would not save one checkpoint",
                where=str(target),
                got=f"no folder that the first rank has made, on rank {dist.get_rank()}",
                expected="one folder that all ranks share",
                next="give a folder on a file system that all nodes share, the same one on every rank",
            )
        )


def _finish_part(target: Path, saves: Sequence[tuple[str, Exception | None]]) -> list[JobFile]:
    """Bring what this rank has written to disk, and its last file; or say what went wrong."""
    for path, error in saves:
        if error is None:
            continue
        raise CheckpointError(
            Fault(
                what="a file of the checkpoint could not be written",
                where=path,
                got=f"{type(error).__name__}: {error}",
                expected="free space in a folder that all ranks can write to, and a client_state that can be pickled",
                next="correct what is wrong and save again: the latest checkpoint is still the one before",
            )
        )
    streams = target / f"random-{dist.get_rank()}.safetensors"
    save_rng_state(streams)
    written = dict.fromkeys([*(Path(path) for path, _ in saves), streams])
    return sealed(target, (path for path in written if path.is_file()), dist.get_rank())


def _finish(
    target: Path, plan: Plan, about: JobManifest, files: Sequence[Sequence[JobFile]], keep_last: int | None
) -> None:
    """Name the checkpoint as the latest; everything that the name promises is on disk by then."""
    write_atomically(target / PLAN_NAME, plan.to_json())
    by_name = {file.name: file for of_rank in files for file in of_rank}
    others = [path for path in target.rglob("*") if path.is_file() and path.name != UNFINISHED_NAME]
    rest = [path for path in others if path.relative_to(target).as_posix() not in by_name]
    everything = sorted([*by_name.values(), *sealed(target, rest, dist.get_rank())])
    for folder in {path.parent for path in others}:
        sync_folder(folder)
    write_atomically(target / ABOUT_NAME, dataclasses.replace(about, files=tuple(everything)).to_json())
    sync_folder(target.parent)
    write_atomically(target.parent / LATEST_NAME, target.name)
    (target / UNFINISHED_NAME).unlink()
    if keep_last is not None:
        remove_older(target.parent, keep_last)


def load_checkpoint(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None, trust: bool = False
) -> dict[str, Any]:
    """Resume `engine` from `folder/tag`; every rank calls it.

    Also restores the random state, and the position of the loader that `initialize` made. On a different mesh, or by
    another plan of the same model, the random number generators are seeded anew.

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
        tag, about, job = together(
            lambda: _what_to_load(engine, folder, plan, ranks, asked, trust), _NOT_READ, _READ_AGAIN
        )
        check_same(
            {"tag": tag, "checkpoint": fingerprint(about.to_json()), "plan": plan.fingerprint},
            what="the ranks would not resume from one checkpoint",
            where=f"load_checkpoint from {folder}",
            next_step="give every rank the same tag, and the folder that the job was saved to",
        )
        together(lambda: _check_bytes(folder / tag, about), _NOT_READ, _READ_AGAIN)
    except (CheckpointError, DocumentError) as error:
        raise _with_another(error, folder, asked) from None
    if not trust:
        together(lambda: _check_is_data(folder / tag), _NOT_READ, _READ_AGAIN)
    if job is not None:
        client_state = load_from_other_mesh(engine, job, plan, ranks)
    else:  # without ZeRO, what DeepSpeed saves does not depend on the number of DP ranks
        with loads_data_only(engine, trust):
            _, client_state = engine.load_checkpoint(str(folder), tag=tag)
    if _differences(about, _about(engine, plan, ranks)):
        restore = partial(seed_from_rng_state, folder / tag / "random-0.safetensors", ranks.dp_rank)
    else:
        restore = partial(load_rng_state, folder / tag / f"random-{dist.get_rank()}.safetensors")
    restore()
    _set_position(engine, about, ranks, restore)
    return {key: value for key, value in client_state.items() if key in about.client_state}


def _what_to_load(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None, trust: bool
) -> tuple[str, JobManifest, SavedJob | None]:
    """The tag, what was written about it, and its files where DeepSpeed cannot load them on this mesh."""
    tag = tag if tag is not None else latest(folder)
    if tag is not None:
        _check_tag(tag, folder)
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
    differences = _differences(about, _about(engine, plan, ranks))
    if differences and (differences != ["dp_size"] or engine.zero_optimization_stage() > 0):
        return tag, about, _saved_job(engine, folder / tag, about, plan, ranks, trust)
    return tag, about, None


def _check_bytes(tag_folder: Path, about: JobManifest) -> None:
    """Compare the bytes of this rank's share of the files with their checksums: the ranks share all of them."""
    faults = list(file_faults(tag_folder, about.files[dist.get_rank() :: dist.get_world_size()]))
    if faults:
        raise CheckpointError(faults)


def _check_is_data(tag_folder: Path) -> None:
    """Look for code in this rank's share of the files."""
    for path in sorted(tag_folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
        check_is_data(path)


def _with_another(error: AutoTPError, folder: Path, asked: str | None) -> AutoTPError:
    """An error of a checkpoint that cannot be read, with the newest one that can as the next step."""
    return gathered(lambda: or_newest_sound(error, folder, asked) if dist.get_rank() == 0 else error, _NOT_READ)[0]


def _set_position(engine: Any, about: JobManifest, ranks: Ranks, restore: Callable[[], None]) -> None:
    """Let the loader that `initialize` made continue with the sample after the last that was trained on."""
    source = _source(engine)
    if source is not None and about.position is not None:
        epoch, samples = about.position
        source.set_position(epoch, samples // ranks.dp_size, restore, _batches(engine, ranks))


def _position(engine: Any, ranks: Ranks) -> tuple[int, int] | None:
    """The epoch of the loader that `initialize` made, and the samples of it that all DP ranks together have seen."""
    source = _source(engine)
    if source is None:
        return None
    size, drop_last = engine.train_micro_batch_size_per_gpu(), engine.dataloader_drop_last()
    epoch, start = source.position(_batches(engine, ranks), size, drop_last)
    return epoch, start * ranks.dp_size


def _batches(engine: Any, ranks: Ranks) -> int:
    """The batches that each DP rank would have had in all, had the job always run on this mesh."""
    batches: int = engine.global_samples // ranks.dp_size // engine.train_micro_batch_size_per_gpu()
    return batches


def _source(engine: Any) -> ResumableSampler | StreamLoader | None:
    """What knows the position of the loader that `initialize` made."""
    loader = getattr(engine, "training_dataloader", None)
    source = loader if isinstance(loader, StreamLoader) else getattr(loader, "data_sampler", None)
    return source if isinstance(source, (ResumableSampler, StreamLoader)) else None


def _check_position(engine: Any, about: JobManifest, ranks: Ranks, folder: Path) -> None:
    """A stream can be resumed where each DP rank's position in it follows from that of the saved job."""
    source = _source(engine)
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


def _check_tag(tag: str, folder: Path) -> None:
    """A tag names a folder inside `folder`, and nothing else."""
    if tag in ("", ".", "..") or "/" in tag or "\\" in tag or "\0" in tag or tag == LATEST_NAME:
        raise CheckpointError(
            Fault(
                what="a tag is not the name of a folder",
                where=str(folder),
                got=repr(tag),
                expected="a plain name, such as step100",
                next="leave out the tag: it is then the number of the step",
            )
        )


def _about(engine: Any, plan: Plan, ranks: Ranks) -> JobManifest:
    return JobManifest(
        plan=plan.fingerprint,
        tp_size=ranks.tp_size,
        dp_size=ranks.dp_size,
        zero_stage=engine.zero_optimization_stage(),
        position=_position(engine, ranks),
        step=engine.global_steps,
        this_mesh_only=why_this_mesh_only(engine),
        client_state=(),
    )


def _differences(saved: JobManifest, wanted: JobManifest) -> list[str]:
    keys = ("plan", "tp_size", "dp_size", "zero_stage")
    return [key for key in keys if getattr(saved, key) != getattr(wanted, key)]


def _saved_job(engine: Any, folder: Path, about: JobManifest, plan: Plan, ranks: Ranks, trust: bool) -> SavedJob:
    """What was saved. Raises MismatchError when it cannot be resumed here, before anything is changed."""
    wanted = _about(engine, plan, ranks)
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
            for key in _differences(about, wanted)
        ]
    if faults:
        raise MismatchError(faults)
    return SavedJob(folder, saved_plan, about.dp_size, about.zero_stage, trust)
