"""What to do when the operating system stopped a command that reads and writes large files."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

_STEPS: Mapping[int, str] = {
    errno.ENOSPC: "free space on the file system of {where}",
    errno.EDQUOT: "free space of your quota on the file system of {where}",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or write to a file system that holds larger files",
    errno.EIO: "look in the kernel's log (dmesg) for what the disk or server of {where} says, and correct it",
    errno.EACCES: "give yourself the right to read and write {where}",
    errno.EPERM: "give yourself the right to read and write {where}",
    errno.EROFS: "mount the file system of {where} so that it can be written to",
    errno.EMFILE: "raise the number of files that may be open (ulimit -n)",
    errno.ENFILE: "raise the number of files that may be open on this machine (sysctl fs.file-max)",
    errno.ENOMEM: "free memory, or give fewer --workers",
    errno.ENOENT: "put back what was removed while the command ran (what it has written itself it writes again)",
    errno.ESTALE: "see that the file server of {where} is there again",
    errno.ENAMETOOLONG: "give the file of {where} a shorter name: this file system takes none that long",
}


def next_step(error: OSError | EOFError, folder: Path, command: str) -> str:
    """The sentence that says how to go on, for the kind of error.

    Args:
        error: what stopped the command.
        folder: what it wrote.
        command: what it is called.
    """
    number = getattr(error, "errno", None)
    step = _STEPS.get(number, "correct what is wrong") if number is not None else "let the input stay as it is"
    where = getattr(error, "filename", None) or folder
    return f"{step.format(where=where)}, and run {command} again: it resumes"
