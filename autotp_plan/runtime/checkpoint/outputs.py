"""Whether a job can write what it will, found before it trains: folders that can be written to, and room."""

from __future__ import annotations

import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autotp_plan.runtime.checkpoint.save_shards import check_shards_folder
from autotp_plan.runtime.deepspeed.agreement import is_first_rank, together
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.loading.weights import DTYPES
from autotp_plan.schemas.errors import Fault, OptionError, OutputError
from autotp_plan.schemas.layout import parameter_shape
from autotp_plan.schemas.plan.document import Plan

_PROBE = b"\0" * 4096
_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "adagrad": 1, "muon": 1}
"""Tensors of a parameter's size that optimizers keep; of those not named here it is two, as of Adam."""


def check_outputs(
    plan: Plan,
    config: Mapping[str, Any],
    *,
    checkpoints: Path | None = None,
    shards: Path | None = None,
    dtype: torch.dtype | None = None,
    saves: int = 1,
) -> None:
    """Check that every rank can write to the folders of a job, and that there is room; every rank calls it.

    Args:
        plan: the plan.
        config: the DeepSpeed config, which says what a checkpoint holds.
        checkpoints: the folder of the job's checkpoints.
        shards: the folder for `save_shards`.
        dtype: of the model; None for that of the files.
        saves: how many more checkpoints there will be at a time than now.

    Raises:
        OutputError: a folder cannot be written to, or there is not enough room. The same on every rank.
        OptionError: `saves` is negative.
    """

    def by_every_rank() -> None:
        if saves < 0:
            raise OptionError(_negative(saves))
        for folder in (checkpoints, shards):
            if folder is not None:
                check_writable(folder)

    def by_the_first() -> None:
        if is_first_rank():
            if shards is not None:
                check_shards_folder(shards)
            needs: dict[Path, dict[str, int]] = defaultdict(dict)
            if checkpoints is not None and saves:
                size = checkpoint_bytes(plan, config, dtype)
                needs[checkpoints][f"{saves} checkpoint{'s' * (saves > 1)} of {_gigabytes(size)}"] = saves * size
            if shards is not None:
                size = shards_bytes(plan)
                needs[shards][f"shards of {_gigabytes(size)}"] = size
            check_room(needs)

    check_all_call("plan.check_outputs")
    for find_out in (by_every_rank, by_the_first):
        together(find_out, "what the job writes cannot be written", "correct what is wrong, or give another folder")


def check_writable(folder: Path) -> None:
    """Write, sync and remove a small file in a folder, or where the folder will be made.

    Raises:
        OutputError: it cannot be done.
    """
    place = existing(folder)
    try:
        descriptor, name = tempfile.mkstemp(prefix=".autotp-probe-", dir=place)
        try:
            os.write(descriptor, _PROBE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            Path(name).unlink()
    except OSError as error:
        raise OutputError(
            Fault(
                code="output-not-writable",
                what="what the job writes cannot be written",
                where=str(folder),
                got=f"{error.strerror or error}, on writing a small file in {place}",
                expected="a folder that every rank can write to",
                next="correct what is wrong, or give another folder",
            )
        ) from None


def check_room(needs: Mapping[Path, Mapping[str, int]]) -> None:
    """Check that the disks have room.

    Args:
        needs: by folder what will be written to it: bytes by what they are.

    Raises:
        OutputError: a disk has less.
    """
    disks: dict[int, dict[str, int]] = defaultdict(dict)
    folders: dict[int, Path] = {}
    for folder, parts in needs.items():
        disk = existing(folder).stat().st_dev
        disks[disk].update(parts)
        folders.setdefault(disk, folder)
    faults = []
    for disk, parts in disks.items():
        status = os.statvfs(existing(folders[disk]))
        free, needed = status.f_bavail * status.f_frsize, sum(parts.values())
        if status.f_blocks and free < needed:  # some network disks know no number of blocks
            faults.append(
                Fault(
                    code="no-room",
                    what="the disk has not enough room for what the job will write",
                    where=str(folders[disk]),
                    got=f"{_gigabytes(free)} free",
                    expected=f"about {_gigabytes(needed)}: {', '.join(parts)}",
                    next="free space, or give a folder on another disk; keep fewer checkpoints (keep_last, or "
                    "--keep-last) or save less often (--save-every)",
                )
            )
    if faults:
        raise OutputError(faults)


def checkpoint_bytes(plan: Plan, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> int:
    """About how many bytes a checkpoint of a job has that trains all weights.

    DeepSpeed saves the weights of every TP rank, but under ZeRO 3; ZeRO and half precision keep a copy in float32 with
    the optimizer's states, which are float32 too.

    Args:
        plan: the plan.
        config: the DeepSpeed config.
        dtype: of the model; None for that of the files.
    """
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    is_half = any((config.get(name) or {}).get("enabled") for name in ("bf16", "fp16"))
    states = _number_of_states(config.get("optimizer") or {})
    total = 0
    for entry in plan.expanded():
        stored = DTYPES[entry.dtype]
        itemsize = (dtype if dtype is not None and stored.is_floating_point else stored).itemsize
        if not stored.is_floating_point:
            per_element = itemsize
        elif stage or is_half:
            per_element = (0 if stage == 3 else itemsize) + 4 + 4 * states
        else:
            per_element = itemsize * (1 + states)
        total += per_element * sum(_numel(plan, entry, rank) for rank in range(plan.tp_size))
    return total


def shards_bytes(plan: Plan) -> int:
    """About how many bytes a shards folder has, in the dtypes of the plan."""
    total = 0
    for entry in plan.expanded():
        is_sharded = plan.layouts[entry.layout].dim is not None
        ranks = range(plan.tp_size if is_sharded else 1)
        total += DTYPES[entry.dtype].itemsize * sum(_numel(plan, entry, rank) for rank in ranks)
    return total


def existing(path: Path) -> Path:
    """A path, or the nearest folder above it that there is."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _numel(plan: Plan, entry: Any, rank: int) -> int:
    layout = plan.layouts[entry.layout]
    return math.prod(parameter_shape(plan.shape_of(entry), layout.shape, layout.rank_shape(rank)))


def _number_of_states(optimizer: Mapping[str, Any]) -> int:
    name = str(optimizer.get("type", "")).lower()
    if name == "sgd" and (optimizer.get("params") or {}).get("momentum"):
        return 1
    return _STATES.get(name, 2)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _negative(saves: int) -> Fault:
    return Fault(
        code="number-of-saves",
        what="the number of checkpoints is not a number",
        where="check_outputs: saves",
        got=str(saves),
        expected="0 or more",
        next="give the number of checkpoints that there will be at a time",
    )
