"""Whether files are what they were: by size, time and inode, and where it is asked for by a checksum of all bytes."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.checksum import Progress


class Stamp(NamedTuple):
    """What a file system says of a file, and the CRC-32 of its bytes where it was taken."""

    size: int
    mtime_ns: int
    inode: int
    crc32: str = ""

    def is_same(self, other: Stamp) -> bool:
        """Whether two stamps are of a file that did not change: by checksums where both have one."""
        if self.crc32 and other.crc32:
            return (self.size, self.crc32) == (other.size, other.crc32)
        return self[:3] == other[:3]


Stamps = Mapping[str, Stamp]
"""By the name of the file."""


def stamps_in(folder: Path) -> Stamps:
    """The stamps of all plain files in a folder, and of those that links in it lead to; none where it has no names."""
    try:
        paths = list(folder.iterdir())
    except OSError:  # whoever reads it says why
        return {}
    return {path.name: stamp for path in paths if (stamp := _stamp(path)) is not None}


class WatchedFiles:
    """Files that a command reads, and what they were before it read the first of them.

    Args:
        paths: files of one folder.
        before: stamps of the folder, taken before anything was read.
        checksums: take the checksum of every byte.
        workers: threads that read for it.
        progress: called with the bytes that were read for it and the bytes in all.

    Attributes:
        stamps: what the files were.

    Raises:
        OSError, EOFError: a file cannot be read.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        before: Stamps,
        *,
        checksums: bool = False,
        workers: int = 4,
        progress: Progress | None = None,
    ) -> None:
        self._paths = {path.name: path for path in paths}
        self._checksums, self._workers, self._progress = checksums, workers, progress
        known = {name: before[name] for name in self._paths if name in before}
        late = {name: stamp for name in self._paths.keys() - known if (stamp := _stamp(self._paths[name])) is not None}
        self.stamps: Stamps = self._with_checksums({**known, **late})
        self._modes = {name: _mode(self._paths[name]) for name in self.stamps}

    def differing(self, stamps: Stamps | None) -> set[str]:
        """The files that are not what `stamps` says; all where it is not known."""
        if stamps is None:
            return set(self.stamps)
        return {
            name
            for name in self.stamps.keys() | (stamps.keys() & self._paths.keys())
            if name not in stamps or name not in self.stamps or not self.stamps[name].is_same(stamps[name])
        }

    def changed(self) -> set[str]:
        """The files that are not any more what they were. Raises OSError, EOFError."""
        now = {name: stamp for name, path in self._paths.items() if (stamp := _stamp(path)) is not None}
        if now.keys() == self.stamps.keys():
            now = dict(self._with_checksums(now))
        return {name for name in now.keys() | self.stamps.keys() if now.get(name) != self.stamps.get(name)}

    def strictest_mode(self, names: Iterable[str]) -> int:
        """Who may read and write what is made of all of these files: who may each; and the owner."""
        return strictest_mode(self._modes[name] for name in names if name in self._modes)

    def _with_checksums(self, stamps: Stamps) -> Stamps:
        if not self._checksums:
            return stamps
        real = {name: self._paths[name].resolve() for name in stamps}
        sizes = {path: stamps[name].size for name, path in real.items()}
        found = checksum.of_files(sizes, workers=self._workers, progress=self._progress)
        with_checksums = {}
        for name, path in real.items():
            crc = found[path]
            if not isinstance(crc, int):
                raise crc
            with_checksums[name] = stamps[name]._replace(crc32=checksum.text(crc))
        return with_checksums


def strictest_mode(modes: Iterable[int]) -> int:
    """Who may read and write what is made of files of these modes: the owner, and others who may each of them."""
    mode = 0o066
    for one in modes:
        mode &= one
    return 0o600 | mode


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:  # it was there a moment ago: it is missed when it is read
        return 0


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
