"""Saving a running job: what DeepSpeed saves, and what it leaves out.

DeepSpeed saves weights, optimizer and scheduler. Next to them are written the random state of every rank, how much
data was consumed, and which plan and mesh it was (`resume.py` reads all of it). The file `latest` names the checkpoint
to resume from; it is written when the files of all ranks are on disk, so a save that dies is not chosen.
"""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from autotp_plan.runtime.checkpoint.job_state import about_engine, check_client_state, check_tag
from autotp_plan.runtime.checkpoint.rng_state import save_rng_state
from autotp_plan.runtime.deepspeed.agreement import check_same, gathered, in_step, together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.job_files import collected_saves
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.documents import sync_folder, write_atomically
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, OptionError
from autotp_plan.schemas.jobs.job_folder import latest, remove_older, sealed
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
        NonFiniteError: a weight is NaN or inf, and the engine stops at that.
        CheckpointError: the tag is not the name of a folder, or names anything but what an unfinished save has left;
            or `client_state` cannot be saved.
    """
    tag = tag if tag is not None else f"step{engine.global_steps}"
    check_all_call("plan.save_checkpoint")
    about = together(lambda: _about_a_save(engine, folder, plan, ranks, tag, client_state, keep_last), _FAILED)
    check_same(
        {"tag": tag, "plan": plan.fingerprint, "step": str(engine.global_steps), "latest": latest(folder)},
        what="the ranks would not save one checkpoint",
        where=f"save_checkpoint to {folder}",
        next_step="give every rank the same tag and a folder that all of them share",
    )
    if (check := getattr(engine, "finite_check", None)) is not None:
        check.before_save()
    target = folder / tag
    token = gathered(lambda: _begin(target, take_over) if dist.get_rank() == 0 else "", _FAILED)[0]
    together(lambda: _check_shared(target, token), _FAILED)
    with collected_saves(engine) as saves:
        in_step(
            lambda: engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False), _FAILED
        )
    files = gathered(lambda: _finish_part(target, saves), _FAILED)
    together(lambda: _finish(target, plan, about, files, keep_last) if dist.get_rank() == 0 else None, _FAILED)
    return tag


def _about_a_save(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str, client_state: dict[str, Any], keep_last: int | None
) -> JobManifest:
    """What is written about a checkpoint, when it may be made."""
    check_tag(tag, folder)
    check_client_state(client_state, folder)
    about = dataclasses.replace(about_engine(engine, plan, ranks), client_state=tuple(sorted(client_state)))
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


def _begin(target: Path, take_over: bool) -> str:
    """Make the folder of the checkpoint; returns what is in the file that calls it unfinished."""
    claim(target.parent, take_over=take_over)
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for folder in (target.parent.parent, target.parent):
        sync_folder(folder)
    token = uuid.uuid4().hex
    (target / UNFINISHED_NAME).write_text(token, encoding="ascii")
    return token


def _check_shared(target: Path, token: str) -> None:
    """Every rank must see what the first one has made, and not what an earlier save left on a disk of its own."""
    marked = target / UNFINISHED_NAME
    if not marked.exists() or marked.read_text(encoding="ascii", errors="replace") != token:
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
