"""The checkpoints of a job: which are complete, and whether their bytes are those that were saved."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.schemas.errors import AutoTPError, CheckpointError, DocumentError, Fault
from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME, LATEST_NAME, UNFINISHED_NAME, JobFile, JobManifest
from autotp_plan.schemas.names import natural_key
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.untrusted.plain_files import TooLargeError, read_plain, sync_file

_MOST_TAG_BYTES = 4096

_MAX_NAME_BYTES = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class JobTag:
    """A checkpoint of a job.

    Attributes:
        name: its tag.
        manifest: what it holds; None where that cannot be read.
        faults: what is wrong with it; empty where it is sound.
    """

    name: str
    manifest: JobManifest | None
    faults: tuple[Fault, ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.manifest.files) if self.manifest else 0


def is_job(folder: Path) -> bool:
    """Whether a folder holds checkpoints of a job."""
    return (folder / LATEST_NAME).is_file() or any(_complete(folder))


def latest(folder: Path) -> str | None:
    """The tag that the file `latest` names; None when there is no such file.

    Raises:
        CheckpointError: what it holds is no tag.
    """
    path = folder / LATEST_NAME
    try:
        found = read_plain(path, _MOST_TAG_BYTES).decode("utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, TooLargeError) as error:
        raise CheckpointError(_not_a_tag(path, str(error))) from None
    is_name = found not in ("", ".", "..") and Path(found).name == found and len(os.fsencode(found)) <= _MAX_NAME_BYTES
    if not is_name or not found.isprintable():
        raise CheckpointError(_not_a_tag(path, repr(found[:80])))
    return found


def checked_tags(folder: Path, *, workers: int = 4, progress: Progress | None = None) -> list[JobTag]:
    """Every complete checkpoint of a job, the newest first, each with what is wrong with it. All bytes are read."""
    return [checked_tag(folder, name, workers=workers, progress=progress) for name in tags(folder)]


def tags(folder: Path) -> list[str]:
    """The tags of complete checkpoints, the newest first: by the time when they were completed."""
    found = [(path.stat().st_mtime_ns, natural_key(path.parent.name), path.parent.name) for path in _complete(folder)]
    return [name for _, _, name in sorted(found, reverse=True)]


def checked_tag(folder: Path, name: str, *, workers: int = 4, progress: Progress | None = None) -> JobTag:
    """One checkpoint with what is wrong with it. All of its bytes are read."""
    try:
        manifest = JobManifest.read(folder / name)
    except DocumentError as error:
        return JobTag(name=name, manifest=None, faults=tuple(error.faults))
    faults = (*missing_files(folder / name, manifest), *file_faults(folder / name, manifest.files, workers, progress))
    return JobTag(name=name, manifest=manifest, faults=faults)


def newest_sound(folder: Path, besides: str | None = None) -> str | None:
    """The newest checkpoint whose bytes are those that were saved; None for none.

    Args:
        folder: of the job.
        besides: a tag that is not asked for.
    """
    for name in tags(folder):
        if name != besides:
            found = checked_tag(folder, name)
            if found.manifest is not None and found.manifest.files and not found.faults:
                return name
    return None


def remove_older(folder: Path, keep_last: int) -> list[str]:
    """Remove complete checkpoints but the newest `keep_last`, and the one that `latest` names; returns their tags.

    Raises:
        OSError: one cannot be removed.
    """
    kept = {*tags(folder)[:keep_last], latest(folder)}
    removed = [name for name in tags(folder) if name not in kept]
    for name in removed:
        (folder / name / UNFINISHED_NAME).touch()  # whatever stops this leaves what the next save may remove
        (folder / name / ABOUT_NAME).unlink()
        shutil.rmtree(folder / name)
    return removed


def missing_files(tag_folder: Path, manifest: JobManifest) -> Iterator[Fault]:
    """Files that a checkpoint should have and has not, or has in another size. Nothing is read."""
    for file in manifest.files:
        try:
            size = (tag_folder / file.name).stat().st_size
        except OSError as error:
            yield _fault(tag_folder / file.name, error.strerror or str(error), f"{file.size} bytes")
            continue
        if size != file.size:
            yield _fault(tag_folder / file.name, f"{size} bytes", f"{file.size} bytes")


def file_faults(
    tag_folder: Path, files: Sequence[JobFile], workers: int = 4, progress: Progress | None = None
) -> Iterator[Fault]:
    """Files whose bytes are not those that were saved; those that are missing or of another size are left out."""
    sizes = {tag_folder / file.name: file.size for file in files if _has_size(tag_folder / file.name, file.size)}
    found = checksum.of_files(sizes, workers=workers, progress=progress)
    for file in files:
        crc = found.get(tag_folder / file.name)
        if crc is not None and (not isinstance(crc, int) or checksum.text(crc) != file.crc32):
            got = f"CRC-32 {checksum.text(crc)}" if isinstance(crc, int) else str(crc)
            yield _fault(tag_folder / file.name, got, f"CRC-32 {file.crc32}")


def sealed(tag_folder: Path, paths: Iterable[Path], rank: int) -> list[JobFile]:
    """Bring files to disk, and return what a manifest says of them.

    Args:
        tag_folder: the folder of the checkpoint.
        paths: files in it that this process has written.
        rank: of this process.

    Raises:
        OSError: a file cannot be synced or read.
        EOFError: a file became shorter meanwhile.
    """
    sizes = {path: path.stat().st_size for path in paths}
    with ThreadPoolExecutor(1) as pool:  # the disk writes while the checksums are computed
        synced = [pool.submit(sync_file, path) for path in sizes]
        found = checksum.of_files(sizes)
    for one in synced:
        one.result()
    entries = []
    for path, crc in found.items():
        if not isinstance(crc, int):
            raise crc
        name = path.relative_to(tag_folder).as_posix()
        entries.append(JobFile(name=name, size=sizes[path], crc32=checksum.text(crc), rank=rank))
    return entries


def or_newest_sound(error: AutoTPError, folder: Path, besides: str | None) -> AutoTPError:
    """The error for a checkpoint that cannot be read, with the newest one that is sound as its next step.

    Args:
        error: why it cannot be read.
        folder: of the job.
        besides: the tag that was asked for; None for the latest.
    """
    if besides is None:
        with contextlib.suppress(CheckpointError):
            besides = latest(folder)
    sound = newest_sound(folder, besides)
    step = (
        f'resume from "{sound}", the newest one that is sound: load_checkpoint(engine, folder, tag="{sound}"), '
        f"or --resume {sound} of the training program"
        if sound is not None
        else "no checkpoint of this folder is sound: start from the shards"
    )
    return CheckpointError([dataclasses.replace(fault, next=step) for fault in error.faults])


def _complete(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in folder.iterdir():
            about = path / ABOUT_NAME
            if about.is_file():
                yield about


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _fault(where: Path, got: str, expected: str) -> Fault:
    return Fault(
        code="job-file",
        what="a file of the checkpoint is not what was saved",
        where=str(where),
        got=got,
        expected=expected,
        next="resume from another checkpoint: `autotp-plan check` of the job's folder lists those that are sound",
    )


def _not_a_tag(path: Path, got: str) -> Fault:
    return Fault(
        code="job-latest",
        what="the file that names the latest checkpoint is damaged",
        where=str(path),
        got=got,
        expected="the name of a folder next to it",
        next="resume from a tag: `autotp-plan check` of the job's folder lists those that are sound",
    )
