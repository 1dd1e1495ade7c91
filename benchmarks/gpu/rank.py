"""One of the two ranks of the checks on a GPU: runs every check, and goes on when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.work import Check, Work

_COLLECTIVE_SECONDS = 100
_MEETING_SECONDS = 300


def main() -> None:
    work = Path(sys.argv[1])
    job = json.loads((work / "job.json").read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // world_size // 2))
    if job["device"] == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(work / "store"), world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=_COLLECTIVE_SECONDS),
    )
    meeting = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_MEETING_SECONDS))
    found: dict[str, Any] = {"machine": _machine(job["device"]), "checks": []}
    place = Work(folder=work, device=job["device"], hidden=job["hidden"], layers=job["layers"])
    for check in CHECKS:
        if job["only"] and not any(check.name.startswith(name) for name in job["only"]):
            continue
        if check.needs_cuda and job["device"] != "cuda":
            continue
        mine = _run(check, place)
        both: list[Any] = [None] * world_size
        dist.all_gather_object(both, mine, group=meeting)
        found["checks"].append(_together(check, both))
        if rank == 0:
            (work / "results.json").write_text(json.dumps(found))
            print(json.dumps(found["checks"][-1]), flush=True)
    dist.barrier(group=meeting)
    os._exit(0)


def _run(check: Check, place: Work) -> dict[str, Any]:
    began = time.monotonic()
    worst: float | None = None
    figures: dict[str, Any] = {}
    error = ""
    try:
        worst, figures = check.function(place)
    except BaseException:  # the next check may well run
        error = traceback.format_exc()
    if place.device == "cuda" and not error:
        with contextlib.suppress(RuntimeError):  # after an assertion on the card nothing works on it
            torch.cuda.empty_cache()
    return {"worst": worst, "figures": figures, "error": error, "seconds": time.monotonic() - began}


def _together(check: Check, both: list[Any]) -> dict[str, Any]:
    """What the ranks found: the largest error, the first rank's figures."""
    errors = [one["worst"] for one in both if one["worst"] is not None]
    worst = max(errors, key=lambda value: math.inf if math.isnan(value) else value) if errors else None
    failed = next((one["error"] for one in both if one["error"]), "")
    ok = not failed and (worst is None or check.limit is None or worst <= check.limit)
    return {
        **{key: value for key, value in dataclasses.asdict(check).items() if key in ("name", "limit")},
        "ok": ok, "worst": worst, "figures": both[0]["figures"], "error": failed,
        "seconds": max(one["seconds"] for one in both),
    }  # fmt: skip


def _machine(device: str) -> dict[str, str]:
    import deepspeed
    import transformers

    versions = f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}"
    if device != "cuda":
        return {"device": "CPU", "versions": versions}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "device": f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB",
        "versions": f"{versions}, CUDA {torch.version.cuda}",
    }


if __name__ == "__main__":
    main()
