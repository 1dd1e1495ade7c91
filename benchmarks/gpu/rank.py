"""One of the ranks of the checks on a GPU, started by `benchmarks.gpu.supervise`: runs checks until one raises."""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.work import Check, Found, Work

_COLLECTIVE_SECONDS = 300


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "0"))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // max(1, world_size) // 2))
    on_card = job["device"] == "cuda"
    if on_card and world_size:
        torch.cuda.set_device(0)
    if world_size:
        dist.init_process_group(
            "nccl" if on_card and world_size == 1 else "gloo",  # NCCL refuses two ranks of one device
            store=dist.FileStore(str(folder / "store"), world_size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=_COLLECTIVE_SECONDS),
        )
    sizes = {name: job[name] for name in ("device", "hidden", "layers", "plant")}
    work = Work(folder=Path(job["work"]), **sizes)
    by_name = {check.name: check for check in CHECKS}
    with (folder / f"found-{rank}.jsonl").open("w") as found:
        for name in job["checks"]:
            if world_size:
                dist.barrier()
            (folder / "begun").touch()
            one = _run(by_name[name], work)
            found.write(json.dumps({"name": name, **one}) + "\n")
            found.flush()
            if one["error"]:
                break  # where the other ranks are is not known any more
    time.sleep(_COLLECTIVE_SECONDS)  # until it is killed: a rank that ends has failed


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(check: Check, work: Work) -> dict[str, object]:
    began = time.monotonic()
    found, error = Found(), ""
    try:
        found = check.function(work)
        if work.device == "cuda" and not check.spoils:
            torch.cuda.empty_cache()
    except BaseException:
        error = traceback.format_exc()
    return {
        "worst": found.worst, "planted": found.planted, "figures": found.figures, "absent": found.absent,
        "error": error, "seconds": time.monotonic() - began,
    }  # fmt: skip


if __name__ == "__main__":
    main()
