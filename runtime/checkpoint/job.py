"""Checkpoints of a running job: DeepSpeed's own, and what it leaves out.

DeepSpeed saves weights, optimizer and scheduler. Beside them lie the random streams of every rank, how much data was
consumed, and which plan and mesh it was. On the same mesh a job goes on exactly as it would have; on another one
(`remesh.py`) its random streams begin anew. The file `latest` names the checkpoint to resume from; it is written when
all ranks are done, so a save that dies is not chosen.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from autotp_plan.runtime.checkpoint.mesh_change import load_elsewhere, unlike, why_not
from autotp_plan.runtime.checkpoint.zero_files import SavedJob
from autotp_plan.runtime.data.batches import ResumableSampler
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.documents import format_json, read_json, write_atomically
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan

ABOUT_NAME = "autotp_checkpoint.json"
PLAN_NAME = "autotp_plan.json"
UNFINISHED_NAME = "autotp_unfinished"
"""A file that a save makes first and removes last: a folder that holds it, and that is not the latest, may be removed.

The folder is complete when it holds `ABOUT_NAME`, which is written when all ranks are done.
"""
LATEST_NAME = "latest"


def save_checkpoint(
    engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None, client_state: dict[str, Any]
) -> str:
    """Save `engine` to `folder/tag` and make it the latest; every rank calls it. Returns the tag.

    Raises MismatchError between two optimizer steps, and CheckpointError when there is anything under the tag but
    what a save that died has left.
    """
    tag = tag if tag is not None else f"step{engine.global_steps}"
    about = {**_about(engine, plan, ranks), "client_state": sorted(client_state)}
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise MismatchError(
            Fault(
                what="gradients that are half accumulated cannot be saved",
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
                expected="a tag of its own for each checkpoint",
                next="give another tag, or remove it yourself",
            )
        )
    dist.barrier()  # all ranks have looked before the first one changes anything
    if dist.get_rank() == 0:
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        (target / UNFINISHED_NAME).touch()
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    _save_streams(folder / tag / f"random-{dist.get_rank()}.safetensors")
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(target / PLAN_NAME, plan.to_json())
        write_atomically(target / ABOUT_NAME, format_json(about))
        write_atomically(folder / LATEST_NAME, tag)
        (target / UNFINISHED_NAME).unlink()
    dist.barrier()
    return tag


def load_checkpoint(engine: Any, folder: Path, plan: Plan, ranks: Ranks, tag: str | None) -> dict[str, Any]:
    """Resume `engine` from `folder/tag` (default: the latest); every rank calls it. Returns the client state.

    Also puts back the random streams, and the position of the loader that `initialize` made. On another mesh, or by
    another plan of the same model, the random streams begin anew. Raises CheckpointError when there is none,
    MismatchError when it is of another model, or of another mesh and cannot be cut anew.
    """
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
    differences = _differences(about, _about(engine, plan, ranks))
    if differences and (differences != ["dp_size"] or engine.zero_optimization_stage() > 0):
        client_state = load_elsewhere(engine, _saved_job(engine, folder / tag, about, plan, ranks), plan, ranks)
    else:  # without ZeRO, what DeepSpeed saves does not depend on the number of DP ranks
        _, client_state = engine.load_checkpoint(str(folder), tag=tag)
    if differences:
        restore = partial(_begin_streams, folder / tag / "random-0.safetensors", ranks.dp_rank)
    else:
        restore = partial(_load_streams, folder / tag / f"random-{dist.get_rank()}.safetensors")
    restore()
    _set_position(engine, about, ranks, restore)
    return {key: value for key, value in client_state.items() if key in about["client_state"]}


def _set_position(engine: Any, about: dict[str, Any], ranks: Ranks, restore: Callable[[], None]) -> None:
    """Let the loader that `initialize` made go on with the sample after the last that was trained on."""
    sampler = _sampler(engine)
    if sampler is not None and about["position"] is not None:
        epoch, samples = about["position"]
        sampler.set_position(epoch, samples // ranks.dp_size, restore, _batches(engine, ranks))


def _position(engine: Any, ranks: Ranks) -> list[int] | None:
    """The epoch of the loader that `initialize` made, and the samples of it that all DP ranks together have seen."""
    sampler = _sampler(engine)
    if sampler is None:
        return None
    size, drop_last = engine.train_micro_batch_size_per_gpu(), engine.dataloader_drop_last()
    epoch, start = sampler.position(_batches(engine, ranks), size, drop_last)
    return [epoch, start * ranks.dp_size]


def _batches(engine: Any, ranks: Ranks) -> int:
    """The batches that each DP rank would have had in all, had the job always run on this mesh."""
    batches: int = engine.global_samples // ranks.dp_size // engine.train_micro_batch_size_per_gpu()
    return batches


def _sampler(engine: Any) -> ResumableSampler | None:
    sampler = getattr(getattr(engine, "training_dataloader", None), "data_sampler", None)
    return sampler if isinstance(sampler, ResumableSampler) else None


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
        "this_mesh_only": why_not(engine),
    }


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [key for key in ("plan", "tp_size", "dp_size", "zero_stage") if saved.get(key) != wanted[key]]


def _saved_job(engine: Any, folder: Path, about: dict[str, Any], plan: Plan, ranks: Ranks) -> SavedJob:
    """What was saved, to be cut anew. Raises MismatchError when it cannot be, before anything is changed."""
    wanted = _about(engine, plan, ranks)
    saved_plan = Plan.read(folder / PLAN_NAME)
    faults = unlike(saved_plan, plan)
    reason = about["this_mesh_only"] or wanted["this_mesh_only"]
    if not faults and reason:
        faults = [
            Fault(
                what="the checkpoint is of another mesh, and cannot be cut anew",
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


def _save_streams(path: Path) -> None:
    """The random streams of this process: torch's (CPU and accelerator), numpy's and Python's."""
    of_numpy: Any = np.random.get_state(legacy=False)
    words = torch.from_numpy(of_numpy["state"]["key"].astype(np.int64))
    tensors = {"torch": torch.get_rng_state(), "numpy": words}
    if get_accelerator().device_name() != "cpu":
        tensors["accelerator"] = get_accelerator().get_rng_state()
    rest = {
        "numpy": [of_numpy["state"]["pos"], of_numpy["has_gauss"], of_numpy["gauss"]],
        "python": random.getstate(),
    }
    save_file(tensors, path, {"streams": json.dumps(rest)})


def _begin_streams(path: Path, dp_rank: int) -> None:
    """New random streams, one for each DP rank, that follow from the saved ones."""
    _load_streams(path)
    seed = int(torch.randint(2**31, ())) + dp_rank
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _load_streams(path: Path) -> None:
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["streams"])
        torch.set_rng_state(file.get_tensor("torch"))
        if "accelerator" in file.keys():  # noqa: SIM118 - not a mapping
            get_accelerator().set_rng_state(file.get_tensor("accelerator"))
        position, has_gauss, gauss = rest["numpy"]
        words = file.get_tensor("numpy").numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, gauss))
    version, state, gauss_next = rest["python"]
    random.setstate((version, tuple(state), gauss_next))
