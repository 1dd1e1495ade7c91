"""Writing files in the order in which the checkpoint's are read, so that these are hashed as they arrive.

A file gets its name only when all that it was made of has been compared: what an interrupted attempt leaves is right.
"""

from __future__ import annotations

import resource
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from autotp_plan.dequantize.computed_file import ComputedFile
from autotp_plan.planner.copying.copy_engine import BUFFER_BYTES, Copier, Counter, settle, wait
from autotp_plan.planner.copying.copy_plan import FileGroup, TensorCopy
from autotp_plan.planner.copying.source_check import wrong_file
from autotp_plan.planner.copying.source_hash import HashingReader, SourceHash
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.shards.output_folder import OutputFolder
from autotp_plan.schemas.storage.checksum import Progress
from autotp_plan.schemas.storage.files import File, Span
from autotp_plan.schemas.storage.safetensors_header import TensorEntry

STEP_BYTES = 8 * 1024 * 1024
"""What is written at a time, about: as many bytes wait for each worker, so that a file is hashed in its order."""


class _Step(NamedTuple):
    """Bytes `[start, stop)` of a tensor of a group; `place` says where the file is read for them."""

    place: tuple[str, int]
    group: _Group
    tensor: TensorCopy
    start: int
    stop: int
    source: SourceHash | None


class _Group:
    """Files that are complete together, and what they are made of."""

    def __init__(self) -> None:
        self.missing: list[OutputFile] = []
        self.outputs: dict[Path, OutputFile] = {}
        self.left = 0
        self.made_of: dict[tuple[int, int], tuple[SourceHash, TensorEntry]] = {}
        self.begun = False


class InSourceOrder:
    """Writes groups of files.

    Args:
        folder: where they are written.
        hashes: of the files that are hashed while they are read.
        workers: threads that read and write.
        total: the bytes of all tensors, for `progress`.
        progress: called with the bytes copied and `total`.
    """

    def __init__(
        self,
        folder: OutputFolder,
        hashes: Mapping[File, SourceHash],
        *,
        workers: int,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._folder, self._hashes, self._workers = folder, hashes, workers
        self._counter = Counter(total, progress)
        self._lock = threading.Lock()
        self._unfinished: list[_Group] = []
        self._finishing: list[Future[None]] = []

    def write(self, groups: Iterable[FileGroup]) -> None:
        """Write the files that the folder does not have yet.

        Raises:
            CheckpointError: a file is not what it should be. What was made of it is not kept.
            OSError: a read or write failed.
            EOFError: a file that is read ended early.
        """
        order = _Order(self._steps(groups))
        _allow_open_files(sum(len(group.missing) for group in self._unfinished))
        with ThreadPoolExecutor(self._workers) as pool, ThreadPoolExecutor(self._workers) as self._syncing:
            try:
                wait([pool.submit(self._work, order) for _ in range(self._workers)])
                for source in self._hashes.values():  # those that nothing is made of
                    self._advance(source, source.size)
                self._finish_groups()
                wait(self._finishing)
            finally:
                self._counter.stopped = True
                settle(self._finishing)
        wrong = [source for source in self._hashes.values() if not source.is_right]
        changed = {
            source.expected.name: source
            for group in self._unfinished
            for source, tensor in group.made_of.values()
            if source.is_right and not source.agrees(tensor)
        }
        if wrong or changed:
            raise CheckpointError(
                [wrong_file(source.expected, source.got) for source in wrong]
                + [wrong_file(source.expected, "bytes that were others a second time") for source in changed.values()]
            )
        assert not self._unfinished

    def _steps(self, groups: Iterable[FileGroup]) -> Iterator[_Step]:
        for files in groups:
            group = _Group()
            steps = [step for tensor in files.tensors for step in self._steps_of(group, tensor)]
            group.missing = [output for output in files.files if output.name not in self._folder.finished]
            if not all(source.is_right for source, _ in group.made_of.values()):
                group.missing = files.files  # what there is was made of bytes that were not compared
            if not group.missing:
                self._counter.add(files.size)
                continue
            group.outputs = {output.path: output for output in group.missing}
            group.left = len(steps)
            self._unfinished.append(group)
            yield from steps

    def _steps_of(self, group: _Group, tensor: TensorCopy) -> Iterator[_Step]:
        """A tensor in steps that read full rows of one tensor of the checkpoint."""
        at = 0
        unit = 1 if tensor.matrices is None else tensor.matrices.size
        for file, begin, length in (part for shard in tensor.sources for part in shard.ranges.ranges):
            if isinstance(file, ComputedFile):
                file.forget()  # what was read before nobody has hashed
                for step in file.steps(Span(begin, length), STEP_BYTES, unit):
                    for entry in step.entries:
                        source = self._hashes.get(entry.file)
                        if source is not None:
                            group.made_of[id(source), entry.start] = source, entry
                    read = self._hashes.get(step.entries[0].file)
                    yield _Step((file.name, step.position), group, tensor, at, at + step.length, read)
                    at += step.length
            else:
                most = max(STEP_BYTES // unit, 1) * unit
                for start in range(0, length, most):
                    count = min(most, length - start)
                    yield _Step((file.name, begin + start), group, tensor, at, at + count, None)
                    at += count

    def _work(self, order: _Order) -> None:
        reader = HashingReader(self._hashes, max_open=32)
        copier = Copier(min(STEP_BYTES, BUFFER_BYTES // self._workers), reader=reader)
        try:
            while not self._counter.stopped and (found := order.next()) is not None:
                number, step = found
                with self._lock:
                    if not step.group.begun:
                        step.group.begun = True
                        for output in step.group.missing:
                            self._folder.begin(output)
                copier.copy(step.tensor, step.start, step.stop, step.group.outputs)
                self._counter.add(step.stop - step.start)
                with self._lock:
                    step.group.left -= 1
                    is_news = not step.group.left
                if step.source is not None:
                    is_news |= self._advance(step.source, order.done(number))
                if is_news:
                    self._finish_groups()
        except BaseException:
            self._counter.stopped = True
            raise
        finally:
            copier.close()

    def _advance(self, source: SourceHash, until: int) -> bool:
        """Hash up to byte `until` of a file; whether it is complete now, and was not."""
        completed = source.advance(until)
        if completed and source.is_right:
            self._folder.remember(source.record())
        return completed

    def _finish_groups(self) -> None:
        """Finish the files of groups of which all is written and compared."""
        with self._lock:
            ready = [group for group in self._unfinished if not group.left and _is_compared(group)]
            for group in ready:
                self._unfinished.remove(group)
                if not group.begun:  # of tensors without bytes
                    for output in group.missing:
                        self._folder.begin(output)
                self._finishing += [self._syncing.submit(self._folder.finish, output) for output in group.missing]


class _Order:
    """The steps in the order of the files that are read, for several threads."""

    def __init__(self, steps: Iterable[_Step]) -> None:
        self._steps = sorted(steps, key=lambda step: step.place)
        self._next = 0
        self._pending: dict[int, deque[int]] = {}
        self._done: set[int] = set()
        for number, step in enumerate(self._steps):
            if step.source is not None:
                self._pending.setdefault(id(step.source), deque()).append(number)
        self._lock = threading.Lock()

    def next(self) -> tuple[int, _Step] | None:
        """The next step, and its number; None where there are no more."""
        with self._lock:
            if self._next == len(self._steps):
                return None
            self._next += 1
            return self._next - 1, self._steps[self._next - 1]

    def done(self, number: int) -> int:
        """A step was done. Up to which byte its file is read, but for what no step reads."""
        source = self._steps[number].source
        assert source is not None
        with self._lock:
            self._done.add(number)
            pending = self._pending[id(source)]
            while pending and pending[0] in self._done:
                self._done.remove(pending.popleft())
            return self._steps[pending[0]].place[1] if pending else source.size


def _is_compared(group: _Group) -> bool:
    return all(source.is_right for source, _ in group.made_of.values()) and all(
        source.agrees(tensor) for source, tensor in group.made_of.values()
    )


def _allow_open_files(count: int) -> None:
    """Let this process have `count` files open, and some more, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 256:
        most = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
