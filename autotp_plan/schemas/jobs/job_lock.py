"""One job writes to a folder of checkpoints: a lock that says who has it, and that ends with its process.

The lock is `flock` on a file that names its owner. Where the file system knows no locks, the owner that the file names
decides: a process of this host is asked for; of another host nobody can say that it has ended but the user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from autotp_plan.schemas.errors import Fault, OutputError
from autotp_plan.schemas.shards.manifest import JOURNAL_NAME, MANIFEST_NAME

LOCK_NAME = "autotp_lock"
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")

_held: dict[Path, int] = {}
"""The descriptors of the locks of this process: a lock is held as long as one is open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who writes to a folder: its host, process and start, and what the scheduler calls its job (empty for nothing)."""

    host: str
    pid: int
    began: int
    since: str
    job: str

    @classmethod
    def me(cls) -> Owner:
        """This process, from now on."""
        job = next((os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)), "")
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(host=socket.gethostname(), pid=os.getpid(), began=_began(os.getpid()), since=since, job=job)

    def __str__(self) -> str:
        of_job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{of_job}, since {self.since}"

    @property
    def is_dead(self) -> bool:
        """Whether it is known to have ended: only of a process of this host that can be known."""
        return self.host == socket.gethostname() and (_began(self.pid) != self.began or self.began == 0)


def claim(folder: Path, *, take_over: bool = False) -> None:
    """Take the lock of a job's folder for as long as this process lives; the folder is made where there is none.

    Args:
        folder: of all checkpoints of the job.
        take_over: take it although the owner that it names cannot be proven dead.

    Raises:
        OutputError: another process has it, or it is a folder of shards, which holds nothing else.
        OSError: the folder cannot be written to.
    """
    path = Path(os.path.realpath(folder)) / LOCK_NAME
    if path in _held and _is_file_of(_held[path], path):
        return
    release(folder)
    if any((folder / name).exists() for name in (MANIFEST_NAME, JOURNAL_NAME)):
        raise OutputError(_of_shards(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        owner = owner_of(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(_taken(folder, owner)) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            if owner is not None and not owner.is_dead and not take_over:
                raise OutputError(_taken(folder, owner, proven=False)) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(asdict(Owner.me())) + "\n").encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[path] = descriptor


def release(folder: Path) -> None:
    """Give the lock of a folder back, where this process has it."""
    path = Path(os.path.realpath(folder)) / LOCK_NAME
    descriptor = _held.pop(path, None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def owner_of(folder: Path) -> Owner | None:
    """Who the lock file of a folder names; None for nobody, or for what cannot be read."""
    try:
        found = json.loads((folder / LOCK_NAME).read_text(encoding="utf-8"))
        return Owner(**found)
    except (OSError, ValueError, TypeError):
        return None


def _is_file_of(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is of the file that is there now: the folder may have been removed and made again."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _began(pid: int) -> int:
    """When a process began, in ticks since the host did; 0 for one that does not live."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _of_shards(folder: Path) -> Fault:
    return Fault(
        code="job-in-shards",
        what="checkpoints of a job would be written into a folder of shards",
        where=str(folder),
        got="a folder with a manifest of shards, which is refused when it holds anything else",
        expected="a folder of its own for the job",
        next="give another folder, such as one next to it",
    )


def _taken(folder: Path, owner: Owner | None, proven: bool = True) -> Fault:
    got = str(owner) if owner is not None else "another process"
    other = "" if proven else "; or, if it has ended, save_checkpoint(..., take_over=True) or --take-over"
    return Fault(
        code="job-locked",
        what="another job writes to this folder",
        where=str(folder),
        got=got if proven else f"{got}, and the file system knows no locks",
        expected="one job at a time",
        next=f"wait until it has ended, or stop it; or give another folder{other}",
    )
