"""Checkpoints of a running job: what DeepSpeed saves, and what it leaves out.

DeepSpeed saves weights, optimizer and scheduler. Next to them are written the random state of every rank, how much
data was consumed, and which plan and mesh it was. Resumed on the same mesh, a job continues exactly as it would have;
on a different one (`mesh_change.py`) it gets new random seeds. The file `latest` names the checkpoint to resume from;
it is written when all ranks are done, so a save that dies is not chosen.
"""

from __future__ import annotations

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
from autotp_plan.runtime.deepspeed.agreement import check_same, together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.internals import collected_save_errors
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.documents import fingerprint, format_json, read_json, write_atomically
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan

ABOUT_NAME = "autotp_checkpoint.json"
PLAN_NAME = "autotp_plan.json"
UNFINISHED_NAME = "autotp_unfinished"
"""A file that a save makes first and removes last: a folder that holds it, and that is not the latest, may be removed.

The folder is complete when it holds `ABOUT_NAME`, which is written when all ranks are done.
"""
LATEST_NAME = "latest"

_FAILED = "the checkpoint could not be written"
_NOT_READ, _READ_AGAIN = "the checkpoint could not be read", "correct what is wrong, or resume from another tag"


def save_checkpoint(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None, client_state: dict[str, Any]
) -> str:
    """Save `engine` to `folder/tag` and make it the latest; every rank calls it, right after an optimizer step.

    Args:
        engine: the DeepSpeed engine.
        folder: the folder of all checkpoints of the job.
        plan: the plan that the model is sharded by.
        ranks: this process's place in the mesh.
        tag: name of the folder to write; None for the number of the step.
        client_state: what the caller wants back when the job resumes.

    Returns:
        The tag.

    Raises:
        MismatchError: gradients have been accumulated since the last optimizer step; or not every rank calls it.
        CheckpointError: the tag is not the name of a folder, or names anything but what an unfinished save has left.
    """
    tag = tag if tag is not None else f"step{engine.global_steps}"
    check_all_call("plan.save_checkpoint")
    about = together(lambda: _about_a_save(engine, folder, plan, ranks, tag, client_state), _FAILED)
    check_same(
        {"tag": tag, "plan": plan.fingerprint, "latest": _latest(folder)},
        what="the ranks would not save one checkpoint",
        where=f"save_checkpoint to {folder}",
        next_step="give every rank the same tag and a folder that all of them share",
    )
    target = folder / tag
    together(lambda: _begin(target) if dist.get_rank() == 0 else None, _FAILED)
    together(lambda: _check_shared(target), _FAILED)
    with collected_save_errors(engine) as errors:
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    together(lambda: _finish_part(target, errors), _FAILED)
    together(lambda: _finish(target, plan, about) if dist.get_rank() == 0 else None, _FAILED)
    return tag


def _about_a_save(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str, client_state: dict[str, Any]
) -> dict[str, Any]:
    """What is written about a checkpoint, when it may be made."""
    about = {**_about(engine, plan, ranks), "client_state": sorted(client_state)}
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
    target = folder / tag
    if target.exists() and (_latest(folder) == tag or not (target / UNFINISHED_NAME).exists()):
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


def _begin(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
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


def _finish_part(target: Path, errors: Sequence[tuple[str, Exception]]) -> None:
    """The last file of this rank; and what went wrong in writing those before it."""
    for path, error in errors:
        raise CheckpointError(
            Fault(
                what="a file of the checkpoint could not be written",
                where=path,
                got=f"{type(error).__name__}: {error}",
                expected="free space in a folder that all ranks can write to, and a client_state that can be pickled",
                next="correct what is wrong and save again: the latest checkpoint is still the one before",
            )
        )
    save_rng_state(target / f"random-{dist.get_rank()}.safetensors")


def _finish(target: Path, plan: Plan, about: dict[str, Any]) -> None:
    write_atomically(target / PLAN_NAME, plan.to_json())
    write_atomically(target / ABOUT_NAME, format_json(about))
    write_atomically(target.parent / LATEST_NAME, target.name)
    (target / UNFINISHED_NAME).unlink()


def load_checkpoint(engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None) -> dict[str, Any]:
    """Resume `engine` from `folder/tag`; every rank calls it.

    Also restores the random state, and the position of the loader that `initialize` made. On a different mesh, or by
    another plan of the same model, the random number generators are seeded anew.

    Args:
        engine: the DeepSpeed engine, as `initialize` made it.
        folder: the folder of all checkpoints of the job.
        plan: the plan that the model is sharded by.
        ranks: this process's place in the mesh.
        tag: which checkpoint; None for the latest.

    Returns:
        The client state that was saved.

    Raises:
        CheckpointError: there is no complete checkpoint, or it cannot be read.
        MismatchError: it is of another model, or can be resumed only on the mesh it was saved on.
        MissingDependencyError: this version of DeepSpeed keeps its state where it is not looked for.
    """
    check_all_call("plan.load_checkpoint")
    tag, about, job = together(lambda: _what_to_load(engine, folder, plan, ranks, tag), _NOT_READ, _READ_AGAIN)
    check_same(
        {"tag": tag, "checkpoint": fingerprint(about), "plan": plan.fingerprint},
        what="the ranks would not resume from one checkpoint",
        where=f"load_checkpoint from {folder}",
        next_step="give every rank the same tag, and the folder that the job was saved to",
    )
    if job is not None:
        client_state = load_from_other_mesh(engine, job, plan, ranks)
    else:  # without ZeRO, what DeepSpeed saves does not depend on the number of DP ranks
        _, client_state = engine.load_checkpoint(str(folder), tag=tag)
    if _differences(about, _about(engine, plan, ranks)):
        restore = partial(seed_from_rng_state, folder / tag / "random-0.safetensors", ranks.dp_rank)
    else:
        restore = partial(load_rng_state, folder / tag / f"random-{dist.get_rank()}.safetensors")
    restore()
    _set_position(engine, about, ranks, restore)
    return {key: value for key, value in client_state.items() if key in about["client_state"]}


def _what_to_load(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None
) -> tuple[str, dict[str, Any], SavedJob | None]:
    """The tag, what was written about it, and its files where DeepSpeed cannot load them on this mesh."""
    tag = tag if tag is not None else _latest(folder)
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
    about = read_json(folder / tag / ABOUT_NAME, "checkpoint")
    _check_position(engine, about, ranks, folder / tag)
    differences = _differences(about, _about(engine, plan, ranks))
    if differences and (differences != ["dp_size"] or engine.zero_optimization_stage() > 0):
        return tag, about, _saved_job(engine, folder / tag, about, plan, ranks)
    return tag, about, None


def _set_position(engine: Any, about: dict[str, Any], ranks: Ranks, restore: Callable[[], None]) -> None:
    """Let the loader that `initialize` made continue with the sample after the last that was trained on."""
    source = _source(engine)
    if source is not None and about["position"] is not None:
        epoch, samples = about["position"]
        source.set_position(epoch, samples // ranks.dp_size, restore, _batches(engine, ranks))


def _position(engine: Any, ranks: Ranks) -> list[int] | None:
    """The epoch of the loader that `initialize` made, and the samples of it that all DP ranks together have seen."""
    source = _source(engine)
    if source is None:
        return None
    size, drop_last = engine.train_micro_batch_size_per_gpu(), engine.dataloader_drop_last()
    epoch, start = source.position(_batches(engine, ranks), size, drop_last)
    return [epoch, start * ranks.dp_size]


def _batches(engine: Any, ranks: Ranks) -> int:
    """The batches that each DP rank would have had in all, had the job always run on this mesh."""
    batches: int = engine.global_samples // ranks.dp_size // engine.train_micro_batch_size_per_gpu()
    return batches


def _source(engine: Any) -> ResumableSampler | StreamLoader | None:
    """What knows the position of the loader that `initialize` made."""
    loader = getattr(engine, "training_dataloader", None)
    source = loader if isinstance(loader, StreamLoader) else getattr(loader, "data_sampler", None)
    return source if isinstance(source, (ResumableSampler, StreamLoader)) else None


def _check_position(engine: Any, about: dict[str, Any], ranks: Ranks, folder: Path) -> None:
    """A stream can be resumed where each DP rank's position in it follows from that of the saved job."""
    source = _source(engine)
    if not isinstance(source, StreamLoader) or about["position"] is None:
        return
    _, samples = about["position"]
    reason = source.why_not_from(samples // ranks.dp_size, about["dp_size"] == ranks.dp_size)
    if samples % ranks.dp_size or reason:
        raise MismatchError(
            Fault(
                what="the stream of data cannot be resumed here",
                where=f"{folder}: position",
                got=reason or f"{samples} samples, which {ranks.dp_size} DP ranks do not divide",
                expected=f"{about['dp_size']} DP ranks and the batch size of the saved job",
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


def _about(engine: Any, plan: Plan, ranks: Ranks) -> dict[str, Any]:
    return {
        "plan": plan.fingerprint,
        "tp_size": ranks.tp_size,
        "dp_size": ranks.dp_size,
        "zero_stage": engine.zero_optimization_stage(),
        "position": _position(engine, ranks),
        "step": engine.global_steps,
        "this_mesh_only": why_this_mesh_only(engine),
    }


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [key for key in ("plan", "tp_size", "dp_size", "zero_stage") if saved.get(key) != wanted[key]]


def _saved_job(engine: Any, folder: Path, about: dict[str, Any], plan: Plan, ranks: Ranks) -> SavedJob:
    """What was saved. Raises MismatchError when it cannot be resumed here, before anything is changed."""
    wanted = _about(engine, plan, ranks)
    saved_plan = Plan.read(folder / PLAN_NAME)
    faults = model_differences(saved_plan, plan)
    reason = about["this_mesh_only"] or wanted["this_mesh_only"]
    if not faults and reason:
        faults = [
            Fault(
                what="the checkpoint can be resumed only on the mesh it was saved on",
                where=f"{folder}: {key}",
                got=str(about.get(key)),
                expected=str(wanted[key]),
                next=f"resume on the mesh it was saved on: {reason}",
            )
            for key in _differences(about, wanted)
        ]
    if faults:
        raise MismatchError(faults)
    return SavedJob(folder, saved_plan, about["dp_size"], about["zero_stage"])


def _latest(folder: Path) -> str | None:
    path = folder / LATEST_NAME
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
