"""Whether files that are there hold what would be written into them now: the same copying, read instead of written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from autotp_plan.planner.copying.copy_engine import write_groups
from autotp_plan.planner.copying.copy_plan import FileGroup
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.storage.checksum import Progress


def differing_bytes(
    groups: Callable[[], Iterable[FileGroup]],
    names: Collection[str] | None = None,
    *,
    workers: int = 4,
    progress: Progress | None = None,
    chunk_bytes: int | None = None,
) -> dict[Path, list[int]]:
    """The files that hold other bytes than would be written, and the places in them.

    Args:
        groups: what would be written, from the beginning each time it is called.
        names: the files to compare; None for all.
        workers: threads that read.
        progress: called with the bytes that were read of what would be written, and these bytes in all.
        chunk_bytes: what is read at once, about.

    Raises:
        OSError: a file cannot be read.
        EOFError: a file that would be copied ends early.
    """
    comparison = _Comparison()
    try:
        write_groups(
            _compared(groups(), names),
            comparison,
            total=sum(group.size for group in _compared(groups(), names)),
            workers=workers,
            progress=progress,
            chunk_bytes=chunk_bytes,
        )
    finally:
        comparison.close()
    return {path: sorted(places) for path, places in comparison.found.items()}


def _compared(groups: Iterable[FileGroup], names: Collection[str] | None) -> Iterator[FileGroup]:
    for group in groups:
        files = [file for file in group.files if names is None or file.name in names]
        if files:
            yield FileGroup([_ComparedFile(file.path, file.size, file.header) for file in files], group.tensors)


class _ComparedFile(OutputFile):
    """A file that is there already. What would be written is compared with what is in it."""

    def create(self) -> None:
        self.places: list[int] = []
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.write(memoryview(self.header), 0)
        if os.fstat(self._descriptor).st_size != self.size:
            self.places.append(self.size)

    def write(self, data: memoryview, position: int) -> None:
        found, at = b"", position
        while len(found) < len(data):
            more = os.pread(self._descriptor, len(data) - len(found), at)
            found, at = found + more if found else more, at + len(more)
            if not more:
                break
        if found != data.tobytes():
            with self._lock:
                self.places.append(position)


class _Comparison:
    """What `write_groups` takes for the folder."""

    def __init__(self) -> None:
        self.finished: dict[str, object] = {}
        self.found: dict[Path, list[int]] = defaultdict(list)
        self._open: list[OutputFile] = []

    def begin(self, output: OutputFile) -> None:
        self._open.append(output)
        output.create()

    def finish(self, output: OutputFile) -> None:
        output.close()
        assert isinstance(output, _ComparedFile)
        if output.places:
            self.found[output.path] = output.places

    def close(self) -> None:
        for output in self._open:
            output.close()
