"""`check` of a job's folder: which of its checkpoints are sound."""

from __future__ import annotations

from pathlib import Path

from autotp_plan.planner.cli.output import progress, say
from autotp_plan.schemas.errors import AutoTPError, CheckpointError, Fault


def check_job(folder: Path) -> None:
    """Compare every byte of a job's checkpoints with its checksum, and list them, the newest first.

    Raises:
        CheckpointError: the one that `latest` names is not sound, or there is no such file; with every fault of it.
    """
    from autotp_plan.planner.plan_table import human_bytes
    from autotp_plan.schemas.jobs.job_folder import checked_tags, latest, or_newest_sound

    with progress("check", False) as shown:
        found = checked_tags(folder, progress=shown)
    try:
        named = latest(folder)
        fault = None if named is not None else _no_latest(folder)
    except CheckpointError as error:
        named, fault = None, error.faults[0]
    for tag in found:
        if tag.faults:
            state = f"not sound: {tag.faults[0].where.rpartition('/')[2]}, {tag.faults[0].got}"
        elif tag.manifest is not None and not tag.manifest.files:
            state = "complete, from before there were checksums"
        else:
            count = len(tag.manifest.files) if tag.manifest else 0
            state = f"sound, every checksum is right ({count} files, {human_bytes(tag.size)})"
        mark = " (latest)" if tag.name == named else ""
        say(f"{tag.name}{mark}: {state}")
    faults = [fault] if fault else [one for tag in found if tag.name == named for one in tag.faults]
    if named is not None and named not in {tag.name for tag in found}:
        faults = [_not_complete(folder / named)]
    if faults:
        raise or_newest_sound(AutoTPError(faults), folder, named)


def _no_latest(folder: Path) -> Fault:
    return Fault(
        code="no-latest",
        what="no file names the latest checkpoint",
        where=str(folder),
        got="no file latest",
        expected="the file that save_checkpoint writes last",
    )


def _not_complete(folder: Path) -> Fault:
    return Fault(
        code="latest-incomplete",
        what="the latest checkpoint is not complete",
        where=str(folder),
        got="no manifest",
        expected="a folder that save_checkpoint finished",
    )
