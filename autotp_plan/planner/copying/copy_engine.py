"""Copying tensors between files: several reads and writes in flight, in a constant amount of memory.

Every byte that is asked for is read once, in long reads, and written once, with its checksum on the way. Where a tensor
is sharded inside its rows, rows are taken apart and put together in memory. No dtype is known here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from autotp_plan.planner.copying.copy_plan import FileGroup, StoredShard, TensorCopy
from autotp_plan.planner.copying.copy_rows import Rows, copy_rows, transpose
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.files import Reader

CHUNK_BYTES = 4 * 1024 * 1024
BUFFER_BYTES = 96 * 1024 * 1024
MAX_OPEN = 32

FAR_CHUNK_BYTES = 32 * 1024 * 1024
"""What is read at once of files far away: several requests of some megabytes each."""


class Target(Protocol):
    """What files are written into: an `OutputFolder`."""

    @property
    def finished(self) -> Container[str]:
        """The files that are complete."""

    def begin(self, output: OutputFile) -> None:
        """Create a file."""

    def finish(self, output: OutputFile) -> None:
        """All of a file is written."""


def write_groups(
    groups: Iterable[FileGroup],
    folder: Target,
    *,
    total: int,
    workers: int,
    progress: Progress | None,
    chunk_bytes: int | None = None,
    once: bool = True,
    completed: Callable[[], None] = lambda: None,
) -> None:
    """Write the files that a folder does not have yet.

    Args:
        groups: all files, and the tensors that fill them.
        folder: where they are written.
        total: the bytes of all tensors, for `progress`.
        workers: threads that copy.
        progress: called with the bytes copied and `total`.
        chunk_bytes: what is read at once, about; None for `CHUNK_BYTES`.
        once: no other process reads the same: what is not in the page cache is read past it.
        completed: called when more files are complete.

    Raises:
        OSError: a read or write failed.
        EOFError: a file that is read ended early.
    """
    counter = Counter(total, progress)
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    chunk = min(chunk_bytes, max(BUFFER_BYTES, 8 * chunk_bytes) // (2 * workers))
    staff = [Copier(chunk, once) for _ in range(workers)]
    finishing: deque[list[Future[None]]] = deque()
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(workers) as syncing:
        try:
            for group in groups:
                missing = [output for output in group.files if output.name not in folder.finished]
                if not missing:
                    counter.add(group.size)
                    continue
                for output in missing:
                    folder.begin(output)
                chunks = _Chunks(group.tensors, chunk)
                by_path = {output.path: output for output in missing}
                wait([pool.submit(worker.work, chunks, by_path, counter) for worker in staff])
                finishing.append([syncing.submit(folder.finish, output) for output in missing])
                if len(finishing) > 1:
                    wait(finishing.popleft())
                    completed()
            while finishing:
                wait(finishing.popleft())
                completed()
        finally:
            counter.stopped = True
            settle([future for futures in finishing for future in futures])
            for worker in staff:
                worker.close()


class Counter:
    """Bytes done so far, over all threads; `stopped` tells them to give up."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` bytes more."""
        with self._lock:
            self.done += count
            if self.progress and count:
                self.progress(self.done, self.total)


class _Chunks:
    """The chunks of tensors, for several threads."""

    def __init__(self, tensors: Iterable[TensorCopy], most: int) -> None:
        self._chunks = ((tensor, start, stop) for tensor in tensors for start, stop in tensor.chunks(most))
        self._lock = threading.Lock()

    def next(self) -> tuple[TensorCopy, int, int] | None:
        with self._lock:
            return next(self._chunks, None)


class _Buffer:
    """Memory that is used again, and grows up to about `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._memory = most, bytearray()

    def take(self, size: int) -> memoryview:
        if len(self._memory) < size:
            self._memory = bytearray(max(size, min(self._most, 2 * size)))
        return memoryview(self._memory)[:size]


class ChunkReader:
    """Reads tensors, a chunk at a time. For one thread. `once` is as for `Reader.read_into`."""

    def __init__(self, chunk_bytes: int, once: bool = False, reader: Reader | None = None) -> None:
        self._chunk, self._rows, self._turned = (_Buffer(chunk_bytes) for _ in range(3))
        self._reader, self._once = reader or Reader(max_open=MAX_OPEN), once

    def close(self) -> None:
        """Close the files that were read."""
        self._reader.close()

    def read(self, tensor: TensorCopy, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)` of a tensor, its matrices transposed where it says so; until the next are read."""
        chunk = self._chunk.take(stop - start)
        for shard in tensor.sources:
            self._read(shard, start, stop, chunk)
        if tensor.matrices is None:
            return chunk
        turned = self._turned.take(stop - start)
        transpose(turned, chunk, *tensor.matrices)
        return turned

    def _read(self, shard: StoredShard, start: int, stop: int, chunk: memoryview) -> None:
        """Fill what a shard holds of `chunk`, which is bytes `[start, stop)` of the full tensor."""
        for strided in shard.copies.within(start, stop):
            first, last = strided.target_range
            ranges = shard.ranges.slice(first, last - first)
            if strided.is_contiguous:
                at = strided.copies[0].source - start
                self._reader.read_into(chunk[at : at + last - first], ranges, once=self._once)
                continue
            rows = self._rows.take(last - first)
            self._reader.read_into(rows, ranges, once=self._once)
            for source, target, length in strided.copies:
                in_chunk = Rows(chunk, source - start, strided.source_stride)
                copy_rows(in_chunk, Rows(rows, target - first, strided.target_stride), length, strided.count)


class Copier(ChunkReader):
    """One thread's buffers and open files."""

    def copy(self, tensor: TensorCopy, start: int, stop: int, outputs: dict[Path, OutputFile]) -> None:
        """Read bytes `[start, stop)` of a tensor, and write them where they belong in `outputs`."""
        chunk = self.read(tensor, start, stop)
        for shard in _targets_in(tensor, outputs):
            self._write(shard, start, stop, chunk, outputs)

    def work(self, chunks: _Chunks, outputs: dict[Path, OutputFile], counter: Counter) -> None:
        """Copy chunks until there are none left, where `outputs` have something of them."""
        try:
            while not counter.stopped and (found := chunks.next()) is not None:
                tensor, start, stop = found
                targets = _targets_in(tensor, outputs)
                if targets and (len(targets) == len(tensor.targets) or _hold(targets, start, stop)):
                    self.copy(tensor, start, stop, outputs)
                counter.add(stop - start)
        except BaseException:
            counter.stopped = True
            raise

    def _write(
        self, shard: StoredShard, start: int, stop: int, chunk: memoryview, outputs: dict[Path, OutputFile]
    ) -> None:
        """Write what a shard holds of `chunk`, in the files that are missing."""
        for strided in shard.copies.within(start, stop):
            first, last = strided.target_range
            if strided.is_contiguous:
                at = strided.copies[0].source - start
                rows = chunk[at : at + last - first]
            else:
                rows = self._rows.take(last - first)
                for source, target, length in strided.copies:
                    in_chunk = Rows(chunk, source - start, strided.source_stride)
                    copy_rows(Rows(rows, target - first, strided.target_stride), in_chunk, length, strided.count)
            for file, position, length in shard.ranges.slice(first, last - first):
                if file in outputs:
                    outputs[file].write(rows[:length], position)
                rows = rows[length:]


def _targets_in(tensor: TensorCopy, outputs: dict[Path, OutputFile]) -> list[StoredShard]:
    """Where a tensor is written in `outputs`."""
    return [shard for shard in tensor.targets if any(part.file in outputs for part in shard.ranges.ranges)]


def _hold(shards: Iterable[StoredShard], start: int, stop: int) -> bool:
    """Whether shards hold something of bytes `[start, stop)` of their tensor."""
    return any(next(shard.copies.within(start, stop), None) is not None for shard in shards)


def wait(futures: Iterable[Future[None]]) -> None:
    """Wait for all, and raise what the first that failed raised."""
    waiting = list(futures)
    settle(waiting)
    for future in waiting:
        future.result()


def settle(futures: Iterable[Future[None]]) -> None:
    """Wait for all."""
    for future in futures:
        future.exception()
