"""Whether what was fetched is what the hub has: the SHA-256 of each file, taken of its bytes as they lie in the shards.

A hash takes the bytes in their order, and they arrive in another, in parts, and some in an earlier attempt. So the
bytes of a file are put together again from the shards that hold them, as `merge` would, once all of them are written;
meanwhile the next are fetched. What is compared is what was written, and nothing is fetched a second time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.planner.shards.copy_engine import CHUNK_BYTES, ChunkReader
from autotp_plan.planner.shards.copy_plan import Matrices, StoredShard, TensorCopy, full_tensor
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.shards.new_shards import NewShards
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, item_size, prefixed

MAX_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Digests:
    """All files of a checkpoint; and the SHA-256 that some must have, in hexadecimal digits, by their names."""

    files: Sequence[SafetensorsFile]
    sha256: Mapping[str, str]


class _Placed:
    """Where a tensor of the checkpoint lies in the shards: in a parameter that is stored so, from byte `offset` on."""

    __slots__ = ("copy", "names", "offset")

    def __init__(self, copy: TensorCopy, offset: int) -> None:
        self.copy, self.offset = copy, offset
        self.names = {Path(str(part.file)).name for shard in copy.sources for part in shard.ranges.ranges}


class SourceCheck:
    """Compares the files of a checkpoint as the shards that hold them are completed.

    Args:
        new: the shards.
        digests: what is compared.
        matrices: what parameters are transposed in the checkpoint.
        folder: where the shards are.
        workers: threads that copy; as many as that, and at most `MAX_THREADS`, hash.
    """

    def __init__(
        self, new: NewShards, digests: Digests, matrices: Mapping[str, Matrices], folder: Path, workers: int
    ) -> None:
        self._folder, self._sha256 = folder, digests.sha256
        compared = [file for file in digests.files if file.path.name in digests.sha256]
        placed = dict(_placed(new, digests.files, matrices, folder)) if compared else {}
        self._tensors = {file.path.name: [(one, placed[one.name]) for one in file.tensors] for file in compared}
        self._headers = {file.path.name: file.header for file in compared}
        self._waiting = list(self._tensors)
        self._found: dict[str, Future[str]] = {}
        self._stopped = False
        self._readers = threading.local()
        self._pool = ThreadPoolExecutor(min(workers, MAX_THREADS), thread_name_prefix="sha256")

    def __enter__(self) -> SourceCheck:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)

    def advance(self, complete: Collection[str]) -> None:
        """Begin with the files of the checkpoint of which all is in files that are `complete`."""
        for name in list(self._waiting):
            if all(placed.names <= set(complete) for _, placed in self._tensors[name]):
                self._waiting.remove(name)
                self._found[name] = self._pool.submit(self._digest, name)

    def finish(self, complete: Collection[str]) -> None:
        """Wait until all are compared.

        Raises:
            CheckpointError: a file is not what it should be. The shards that hold something of it are removed.
            OSError: a shard cannot be read.
        """
        self.advance(complete)
        assert not self._waiting, f"{self._waiting} are not in the shards"
        wrong = {
            name: digest for name, found in self._found.items() if (digest := found.result()) != self._sha256[name]
        }
        if not wrong:
            return
        for file in {file for name in wrong for _, placed in self._tensors[name] for file in placed.names}:
            (self._folder / file).unlink(missing_ok=True)  # two may finish a folder at once
        raise CheckpointError(_fault(name, digest, self._sha256[name]) for name, digest in wrong.items())

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256(prefixed(self._headers[name].encode()))
        reader = getattr(self._readers, "one", None)
        if reader is None:
            reader = self._readers.one = ChunkReader(CHUNK_BYTES)
        try:
            for tensor, placed in self._tensors[name]:
                for data in _bytes(reader, placed, tensor.stop - tensor.start):
                    digest.update(data)
                    if self._stopped:
                        return ""
        finally:
            reader.close()
        return digest.hexdigest()


def _placed(
    new: NewShards, files: Sequence[SafetensorsFile], matrices: Mapping[str, Matrices], folder: Path
) -> Iterator[tuple[str, _Placed]]:
    """Where each tensor of the checkpoint lies, by its name."""
    sizes = {tensor.name: tensor.stop - tensor.start for file in files for tensor in file.tensors}
    for of_ranks in new.layout.groups():
        ranges = [file.byte_ranges(folder) for file in of_ranks]
        for index, tensor in enumerate(of_ranks[0].tensors):
            if tensor.parameter is None:
                kept = (full_tensor(ranges[0][index]),)
                yield tensor.name, _Placed(TensorCopy(tensor.size, kept, ()), 0)
                continue
            layout = new.plan.layouts[tensor.parameter.layout]
            shards = tuple(
                StoredShard(of_rank[index], copies)
                for rank, of_rank in enumerate(ranges)
                if (copies := layout.first_held_copies(rank, item_size(tensor.dtype))).copies
            )
            names = tensor.parameter.names_on_disk()
            on_disk = matrices.get(tensor.parameter.name)
            copy = TensorCopy(
                sum(sizes[name] for name in names), shards, (), None if on_disk is None else on_disk.transposed()
            )
            offset = 0
            for name in names:
                yield name, _Placed(copy, offset)
                offset += sizes[name]


def _bytes(reader: ChunkReader, placed: _Placed, size: int) -> Iterator[memoryview]:
    """The bytes of a tensor as they lie in the checkpoint."""
    copy = placed.copy
    for start, stop in copy._replace(size=size).chunks(CHUNK_BYTES):
        yield reader.read(copy, placed.offset + start, placed.offset + stop)


def _fault(name: str, got: str, expected: str) -> Fault:
    return Fault(
        code="wrong-sha256",
        what="a file that was fetched is not the one that the hub has",
        where=name,
        got=f"SHA-256 {got}",
        expected=f"SHA-256 {expected}",
        next="run the command again: what was made of this file was removed, and is fetched again",
    )
