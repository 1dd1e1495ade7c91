"""python -m benchmarks.faults [--kills 210] [--corruptions 400] [--seed 0]

Kills presplit, merge and reshard at random moments (SIGKILL of a process of its own), continues each until it is done,
and compares every byte with an undisturbed run; then changes shards at random and asks `check` whether it notices. A
file system that is full is one of the commands' own, where this machine lets us mount one.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from autotp_plan.planner import check_shards
from autotp_plan.schemas.errors import AutoTPError, OutputError
from tests.helpers.faults import check_no_half_files, corrupt, job_of, kill_until_done, prepare, run_job
from tests.helpers.random_shards import files_of

COMMANDS = ("presplit", "merge", "reshard")


def kills(work: Path, wanted: int, random: Random) -> bool:
    done: collections.Counter[str] = collections.Counter()
    rounds = 0
    right = True
    before = files_of(work / "original")
    while sum(done.values()) < wanted:
        command = COMMANDS[rounds % 3]
        output = work / f"killed-{rounds}"
        done[command] += kill_until_done(job_of(work, command, output), random, kills=8, pause=0.01, longest=0.6)
        right &= files_of(output) == files_of(work / command)
        shutil.rmtree(output)
        rounds += 1
    right &= files_of(work / "original") == before
    each = ", ".join(f"{done[command]} of {command}" for command in COMMANDS)
    print(f"kills                        {sum(done.values())} ({each}) in {rounds} runs")
    print(f"every run ended byte-identical, no half file with a final name: {_verdict(right)}")
    return right


def full_disk(work: Path) -> bool | None:
    """A file system of 48 KiB: each command fails, and continues when there is room."""
    disk = work / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        print("full disk                    not tried: this user may not mount a tmpfs")
        return None
    right = True
    try:
        for command in COMMANDS:
            task = job_of(work, command, disk / command)
            try:
                run_job(task)
                right = False
            except OutputError as error:
                right &= "No space left on device" in str(error)
            check_no_half_files(disk / command)
            kept = len(list((disk / command).glob("[!.]*.safetensors")))
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
            run_job(task)
            right &= files_of(disk / command) == files_of(work / command)
            print(f"full disk                    {command}: {kept} files complete, then continued")
            shutil.rmtree(disk / command)
            subprocess.run(["mount", "-o", "remount,size=48k", str(disk)], check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    print(f"every command said so, and continued to the same bytes: {_verdict(right)}")
    return right


def corruptions(work: Path, wanted: int, random: Random) -> bool:
    found: collections.Counter[str] = collections.Counter()
    missed: list[str] = []
    for _ in range(wanted):
        folder = work / "changed"
        shutil.copytree(work / "presplit", folder)
        how = corrupt(folder, work / "other", random)
        try:
            check_shards(folder)
            missed.append(how)
        except AutoTPError:
            found[how.split()[0]] += 1
        shutil.rmtree(folder)
    print(
        f"corruptions                  {wanted}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    )
    print(
        f"check found {sum(found.values())} of {wanted}: {_verdict(not missed)}"
        + "".join(f"\n  missed: {how}" for how in missed)
    )
    return not missed


def _verdict(right: bool) -> str:
    return "yes" if right else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=210)
    parser.add_argument("--corruptions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = prepare(Path(name))
        results = [
            corruptions(work, options.corruptions, Random(options.seed)),
            full_disk(work),
            kills(work, options.kills, Random(options.seed)),
        ]
    print(f"all of it took {time.monotonic() - started:.0f} s")
    sys.exit(any(result is False for result in results))


if __name__ == "__main__":
    main()
