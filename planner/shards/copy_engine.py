"""Writing files out of pieces of other files: several reads and writes in flight, in a constant amount of memory.

Every byte that is asked for is read once, in long pieces, and written once, with its checksum on the way. Where a
tensor is cut inside its rows, rows are taken apart and put together in memory. No dtype is known here.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.planner.shards.copy_plan import Move, Part, Span
from autotp_plan.planner.shards.copy_rows import copy_rows
from autotp_plan.planner.shards.resumable_folder import OutputFile, OutputFolder, Progress

CHUNK_BYTES = 2 * 1024 * 1024
BUFFER_BYTES = 96 * 1024 * 1024
MAX_OPEN = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Files that are written together, and the moves that fill them: `size` bytes read."""

    outputs: Sequence[OutputFile]
    moves: Iterable[Move]
    size: int


def write_batches(
    batches: Iterable[Batch], folder: OutputFolder, *, total: int, workers: int, progress: Progress | None
) -> None:
    """Write all files of `batches` that `folder` does not have yet. Raises OSError, or EOFError for a short input."""
    counter = _Counter(total, progress)
    chunk = min(CHUNK_BYTES, BUFFER_BYTES // (2 * workers))
    staff = [_Worker(chunk, folder, counter) for _ in range(workers)]
    finishing: deque[list[Future[None]]] = deque()
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(workers) as syncing:
        try:
            for batch in batches:
                missing = [output for output in batch.outputs if output.name not in folder.finished]
                if not missing:
                    counter.add(batch.size)
                    continue
                for output in missing:
                    folder.begin(output)
                chunks = _Chunks(batch.moves, chunk)
                by_path = {folder.path / output.name: output for output in missing}
                _wait([pool.submit(worker.work, chunks, by_path) for worker in staff])
                finishing.append([syncing.submit(folder.finish, output) for output in missing])
                if len(finishing) > 1:
                    _wait(finishing.popleft())
            while finishing:
                _wait(finishing.popleft())
        finally:
            counter.stopped = True
            _settle([future for group in finishing for future in group])
            for worker in staff:
                worker.close()


class _Counter:
    """Bytes done so far, over all threads; `stopped` tells them to give up."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self.progress and count:
                self.progress(self.done, self.total)


class _Chunks:
    """The chunks of moves, for several threads."""

    def __init__(self, moves: Iterable[Move], most: int) -> None:
        self._chunks = ((move, start, stop) for move in moves for start, stop in move.chunks(most))
        self._lock = threading.Lock()

    def next(self) -> tuple[Move, int, int] | None:
        with self._lock:
            return next(self._chunks, None)


class _Worker:
    """One thread's buffers and open files."""

    def __init__(self, chunk: int, folder: OutputFolder, counter: _Counter) -> None:
        self._size, self._folder, self._counter = chunk, folder, counter
        self._chunk, self._rows = bytearray(), bytearray()
        self._open: OrderedDict[Path, int] = OrderedDict()

    def work(self, chunks: _Chunks, outputs: dict[Path, OutputFile]) -> None:
        """Copy chunks until there are none left."""
        try:
            while not self._counter.stopped and (found := chunks.next()) is not None:
                move, start, stop = found
                wanted = [part for part in move.outputs if any(file in outputs for file in part.segments.files)]
                if wanted:
                    for part in move.inputs:
                        self._read(part, start, stop)
                    for part in wanted:
                        self._write(part, start, stop, outputs)
                self._counter.add(stop - start)
        except BaseException:
            self._counter.stopped = True
            raise

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, part: Part, start: int, stop: int) -> None:
        chunk = self._buffer("_chunk", stop - start)
        for span in part.spans(start, stop):
            if _is_straight(span):
                at = span.runs[0].whole - start
                self._fill(part, chunk[at : at + span.length], span.start)
            else:
                rows = self._buffer("_rows", span.length)
                self._fill(part, rows, span.start)
                for run in span.runs:
                    inside = (run.length, run.count)
                    copy_rows(chunk, run.whole - start, part.stride, rows, run.at, part.local, *inside)

    def _write(self, part: Part, start: int, stop: int, outputs: dict[Path, OutputFile]) -> None:
        chunk = self._buffer("_chunk", stop - start)
        for span in part.spans(start, stop):
            if _is_straight(span):
                at = span.runs[0].whole - start
                rows = chunk[at : at + span.length]
            else:
                rows = self._buffer("_rows", span.length)
                for run in span.runs:
                    inside = (run.length, run.count)
                    copy_rows(rows, run.at, part.local, chunk, run.whole - start, part.stride, *inside)
            at = 0
            for file, position, length in part.segments.ranges(span.start, span.length):
                if file in outputs:
                    self._folder.write(outputs[file], rows[at : at + length], position)
                at += length

    def _fill(self, part: Part, target: memoryview, offset: int) -> None:
        for file, position, length in part.segments.ranges(offset, len(target)):
            left, descriptor = target[:length], self._descriptor(file)
            target = target[length:]
            while left:
                got = os.preadv(descriptor, [left], position)
                if got == 0:
                    raise EOFError(f"{file} ended {len(left)} bytes early; it changed while it was read")
                left, position = left[got:], position + got

    def _descriptor(self, file: Path) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self._open[file] = descriptor
        self._open.move_to_end(file)
        return descriptor

    def _buffer(self, name: str, size: int) -> memoryview:
        buffer: bytearray = getattr(self, name)
        if len(buffer) < size:
            buffer = bytearray(max(size, min(self._size, 2 * size)))
            setattr(self, name, buffer)
        return memoryview(buffer)[:size]


def _is_straight(span: Span) -> bool:
    run = span.runs[0]
    return len(span.runs) == 1 and run.count == 1 and run.length == span.length


def _wait(futures: Iterable[Future[None]]) -> None:
    """Wait for all, and raise what the first that failed raised."""
    waiting = list(futures)
    _settle(waiting)
    for future in waiting:
        future.result()


def _settle(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.exception()
