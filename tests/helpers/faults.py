"""python -m tests.helpers.faults COMMAND SECONDS JSON

Runs presplit, merge or reshard so slowly (a pause before every write) that a kill at a random moment finds it in the
middle of something. It says `started` when it begins. Also: corruptions of a shards folder, chosen at random.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from autotp_plan.planner import compile_plan, merge, presplit, reshard
from autotp_plan.schemas.errors import AutoTPError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from tests.helpers.checkpoints import write_llama

Job = dict[str, Any]
SMALL_FILES = 9000


def prepare(work: Path) -> Path:
    """In `work`: a checkpoint `original` and its `plan.json`; what undisturbed runs of `presplit`, `merge` and
    `reshard` make of them; `further`, the same model trained further, and `other`, its shards by the same plan.
    """
    original = write_llama(work / "original", num_files=3)
    plan = compile_plan(original, tp_size=2)
    (work / "plan.json").write_text(plan.to_json())
    for command in ("presplit", "merge", "reshard"):
        run_job(job_of(work, command, work / command))
    assert len(list((work / "presplit").glob("tp-00*"))) > 2, "several files for each rank"
    further = shutil.copytree(original, work / "further")
    for path in further.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[4000:] = bytes(byte ^ 1 for byte in data[4000:])
        path.write_bytes(data)
    presplit(plan, further, work / "other", max_file_bytes=SMALL_FILES)
    return work


def job_of(work: Path, command: str, output: Path) -> Job:
    """What `run_job` takes, for a command on what `prepare` made."""
    return {
        "command": command,
        "input": str(work / ("original" if command == "presplit" else "presplit")),
        "output": str(output),
        "plan": str(work / "plan.json"),
        "tp_size": 4,
        "max_file_bytes": SMALL_FILES,
    }


def run_job(job: Job, **options: Any) -> None:
    """Run a command: {"command", "input", "output", and "plan" or "tp_size"}, in this process."""
    source, output = Path(job["input"]), Path(job["output"])
    if job["command"] == "merge":
        merge(source, output, **options)
    elif job["command"] == "reshard":
        reshard(source, output, tp_size=job["tp_size"], max_file_bytes=job["max_file_bytes"], **options)
    else:
        presplit(Plan.read(Path(job["plan"])), source, output, max_file_bytes=job["max_file_bytes"], **options)


def kill_until_done(job: Job, random: Random, *, kills: int, pause: float, longest: float) -> int:
    """Run a job in new processes, killed `kills` times at random moments, then to its end; how many kills hit it."""
    hit = 0
    for attempt in range(kills + 1):
        command = [sys.executable, "-m", "tests.helpers.faults", json.dumps(job), str(pause if attempt < kills else 0)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        if attempt < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0, longest))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert attempt < kills and process.returncode == -signal.SIGKILL, errors.decode()
        hit += 1
        check_no_half_files(Path(job["output"]))
    return hit


def check_no_half_files(output: Path) -> None:
    """Every safetensors file with a final name is complete: its header accounts for all of its bytes."""
    from autotp_plan.schemas.storage.safetensors_header import read_header

    for path in output.glob("[!.]*.safetensors") if output.exists() else ():
        read_header(path)


def corrupt(folder: Path, other: Path, random: Random) -> str:
    """Change a shards folder somehow; `other` holds shards of the same plan of another checkpoint. Says how."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = random.choice(files)
    kind = random.choice(
        ["flip", "flip", "flip", "truncate", "append", "missing", "foreign", "swap", "mixed", "zeros", "link"]
    )
    data = bytearray(path.read_bytes())
    if kind == "flip" and data:
        at = random.randrange(len(data))
        data[at] ^= 1 << random.randrange(8)
        path.write_bytes(data)
    elif kind == "truncate" and data:
        os.truncate(path, random.randrange(len(data)))
    elif kind == "append":
        path.write_bytes(data + random.randbytes(random.randint(1, 9)))
    elif kind == "missing":
        path.unlink()
    elif kind == "swap":
        weights = [file for file in files if file.name.startswith("tp-")]
        one, two = random.sample(weights, 2)
        held = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(held)
    elif kind == "mixed":
        path = random.choice([file for file in files if file.suffix == ".safetensors" or file.name == MANIFEST_NAME])
        shutil.copyfile(other / path.name, path)
    elif kind == "zeros" and any(data):
        start = random.choice([at for at, byte in enumerate(data) if byte][:1000])
        data[start : start + 512] = bytes(len(data[start : start + 512]))
        path.write_bytes(data)
    elif kind == "link":
        path.rename(folder.parent / "aside")
        path.symlink_to(folder.parent / "aside")
    else:
        kind = "foreign"
        path = (
            folder / f"{random.choice(['tp-09-of-10', 'shared', 'x'])}.{random.choice(['safetensors', 'pt', 'json'])}"
        )
        path.write_bytes(random.randbytes(20))
    return f"{kind} {path.name}"


def _main() -> None:
    job, pause = json.loads(sys.argv[1]), float(sys.argv[2])
    pwritev, fsync, replace = os.pwritev, os.fsync, Path.replace

    def slowly(function: Any) -> Any:
        def run(*args: Any) -> Any:
            time.sleep(pause)
            return function(*args)

        return run

    if pause:
        os.pwritev, os.fsync = slowly(pwritev), slowly(fsync)
        Path.replace = slowly(replace)  # type: ignore[method-assign]
    print("started", flush=True)
    try:
        run_job(job, workers=2)
    except AutoTPError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
