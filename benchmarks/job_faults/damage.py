"""What may happen to the files of a job that nobody is writing: each function changes a folder, and says how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME, LATEST_NAME
from benchmarks.job_faults.disk import PAGE

Damage = Callable[[Path, Random], str]
"""Changes the checkpoint `two` of a job, the latest; `one` stays as it is."""


def flip(job: Path, random: Random) -> str:
    """A bit of any file."""
    path = _any_file(job, random)
    data = bytearray(path.read_bytes())
    at, bit = random.randrange(len(data)), random.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {at}"


def truncate(job: Path, random: Random) -> str:
    """Any file, to any length; often none."""
    path = _any_file(job, random)
    size = random.choice((0, random.randrange(path.stat().st_size)))
    os.truncate(path, size)
    return f"{path.name}: {size} bytes"


def zero(job: Path, random: Random) -> str:
    """A page, or all."""
    path = _any_file(job, random)
    data = bytearray(path.read_bytes())
    at = random.randrange(0, len(data), PAGE)
    end = len(data) if random.random() < 0.2 else min(at + PAGE, len(data))
    if not any(data[at:end]):
        at, end = 0, len(data)
    data[at:end] = bytes(end - at)
    path.write_bytes(data)
    return f"{path.name}: bytes {at} to {end}"


def swap(job: Path, random: Random) -> str:
    """Files of two ranks exchanged, or those of the checkpoint before in the place of these: one, or all of a rank."""
    files = _files(job / "two")
    how = random.randrange(3)
    if how == 0:
        kinds: dict[str, list[Path]] = {}
        for path in files:
            kinds.setdefault("".join(letter for letter in path.name if not letter.isdigit()), []).append(path)
        one, other = random.sample(random.choice([same for same in kinds.values() if len(same) > 1]), 2)
        held = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(held)
        return f"{one.name} and {other.name}"
    if how == 1:
        differ = [path for path in files if path.read_bytes() != (job / "one" / path.name).read_bytes()]
        path = random.choice(differ)
        shutil.copy(job / "one" / path.name, path)
        return f"{path.name} of the checkpoint before"
    rank = random.randrange(2)
    for path in files:
        if f"mp_rank_{rank:02d}" in path.name or path.name == f"random-{rank}.safetensors":
            shutil.copy(job / "one" / path.name, path)
    return f"all of rank {rank} of the checkpoint before"


def remove(job: Path, random: Random) -> str:
    """Any file."""
    path = _any_file(job, random)
    path.unlink()
    return path.name


def replace_with_odd(job: Path, random: Random) -> str:
    """A file becomes a folder, a pipe, or a link to nowhere."""
    path = _any_file(job, random)
    path.unlink()
    how = random.choice(("folder", "pipe", "link"))
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[how]()
    return f"{path.name}: {how}"


def halve_manifest(job: Path, random: Random) -> str:
    """The manifest ends anywhere."""
    path = job / "two" / ABOUT_NAME
    size = random.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{size} bytes"


def spoil_latest(job: Path, random: Random) -> str:
    """The file that names the latest checkpoint."""
    path = job / LATEST_NAME
    texts = (b"", b"tw", b"two\n\n", b"\xff\xfe", b"../two", b"three", b"\0" * 3, b"\x1b[2J", b"two" * 200, None)
    text = random.choice(texts)
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text)
    return repr(text)


DAMAGES: dict[str, Damage] = {
    "bit flipped": flip,
    "truncated": truncate,
    "page zeroed": zero,
    "files swapped": swap,
    "file missing": remove,
    "no plain file": replace_with_odd,
    "half manifest": halve_manifest,
    "latest damaged": spoil_latest,
}


def _files(tag: Path) -> list[Path]:
    return sorted(path for path in tag.rglob("*") if path.is_file())


def _any_file(job: Path, random: Random) -> Path:
    return random.choice(_files(job / "two"))
