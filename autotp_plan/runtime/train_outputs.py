"""What the training program finds out about its outputs before it loads anything."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from autotp_plan.runtime.deepspeed.agreement import is_first_rank, together
from autotp_plan.runtime.train_report import check_metrics
from autotp_plan.runtime.training_plan import TrainingPlan
from autotp_plan.schemas.errors import AutoTPError, Fault, OutputError
from autotp_plan.schemas.jobs.job_folder import tags
from autotp_plan.schemas.jobs.job_lock import claim
from autotp_plan.schemas.jobs.job_manifest import JobManifest
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME


def check_job_outputs(
    plan: TrainingPlan, config: dict[str, Any], dtype: torch.dtype, checkpoints: Path | None, save_shards: Path | None,
    metrics: Path | None, num_steps: int, save_every: int | None, keep_last: int | None, take_over: bool,
) -> None:  # fmt: skip
    """Check that the files of a job can be written, and take the lock of its folder; every rank calls it.

    Args:
        plan: the plan, whose process groups have been made.
        config: the DeepSpeed config.
        dtype: of the model.
        checkpoints: `--checkpoints`.
        save_shards: `--save-shards`.
        metrics: `--metrics`.
        num_steps: `--num-steps`.
        save_every: `--save-every`.
        keep_last: `--keep-last`.
        take_over: `--take-over`.

    Raises:
        OutputError: something cannot be written, there is not enough room, or another job writes to the folder. The
            same on every rank.
    """
    if metrics is not None:
        together(lambda: check_metrics(metrics) if is_first_rank() else None, "the metrics cannot be written")
    if save_shards is not None:
        together(lambda: _check_is_new(save_shards), "the shards cannot be saved")
    if checkpoints is None and save_shards is None:
        return
    saves = more_saves(checkpoints, num_steps, save_every, keep_last) if checkpoints is not None else 0
    plan.check_outputs(config, checkpoints=checkpoints, shards=save_shards, dtype=dtype, saves=saves)
    if checkpoints is not None:
        together(
            lambda: claim(checkpoints, take_over=take_over) if is_first_rank() else None,
            "the job's folder cannot be written to",
            "correct what is wrong, or give another folder to --checkpoints",
        )


def _check_is_new(folder: Path) -> None:
    if (folder / MANIFEST_NAME).exists():
        raise OutputError(
            Fault(
                what="the shards could not be saved after training",
                where="--save-shards",
                got=f"{folder}, which holds finished shards",
                expected="a new folder",
                next="give another folder",
            )
        )


def more_saves(checkpoints: Path, num_steps: int, save_every: int | None, keep_last: int | None) -> int:
    """How many more checkpoints there will be at a time than now."""
    there = tags(checkpoints)
    done = 0
    if there:
        with contextlib.suppress(AutoTPError):  # that it is damaged is said when it is read
            done = JobManifest.read(checkpoints / there[0]).step
    every = save_every or num_steps
    saves = -(-num_steps // every) - done // every if done < num_steps else 0
    if keep_last is None or not saves:
        return saves
    return max(min(len(there) + saves, keep_last + 1) - len(there), 1)
