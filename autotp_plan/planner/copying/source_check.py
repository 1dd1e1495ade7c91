"""Whether what was fetched is what the hub has: the SHA-256 of each file, taken of its bytes as they lie in the shards.

A hash takes the bytes in their order, and they arrive in another, in parts, and some in an earlier attempt. So the
bytes of a file are put together again from the shards that hold them, as `merge` would, once all of them are written;
meanwhile the next are fetched. What is compared is what was written, and nothing is fetched a second time. What is in
no shard (of `.bin` files what lies between the tensors) is fetched for it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from autotp_plan.planner.copying.bytes_in_order import Placed, SourceChanged, bytes_in_order
from autotp_plan.planner.copying.copy_engine import CHUNK_BYTES, ChunkReader
from autotp_plan.planner.copying.copy_plan import Matrices, StoredShard, TensorCopy, full_tensor
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.shards.new_shards import NewShards
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import File
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, item_size

MAX_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a file must be.

    Attributes:
        name: what the hub calls it.
        sha256: in hexadecimal digits.
        stored: the file itself: far away, or in the hub's cache.
        described: its tensors; None for one that is copied as it is.
    """

    name: str
    sha256: str
    stored: File
    described: SafetensorsFile | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Digests:
    """What files must be.

    Attributes:
        files: all files of the checkpoint.
        expected: those of them, and of those that are copied, that are compared.
        computed_from: files that weights are computed from, and that are compared while they are read.
    """

    files: Sequence[SafetensorsFile]
    expected: Sequence[Expected]
    computed_from: Sequence[Expected] = ()


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
        self._folder = folder
        placed = dict(_placed(new, digests.files, matrices, folder)) if digests.expected else {}
        copied = {file.name: _copied(folder / file.name, file.size) for file in new.original.copied}
        self._parts: dict[str, list[Placed]] = {}
        self._expected: dict[str, Expected] = {}
        for one in digests.expected:
            tensors = None if one.described is None else one.described.tensors
            parts = [copied[one.name]] if tensors is None else [placed[tensor.name] for tensor in tensors]
            self._expected[one.name], self._parts[one.name] = one, parts
        self._waiting = list(self._expected)
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
            if all(placed.names <= set(complete) for placed in self._parts[name]):
                self._waiting.remove(name)
                self._found[name] = self._pool.submit(self._digest, self._expected[name], self._parts[name])

    def finish(self, complete: Collection[str]) -> None:
        """Wait until all are compared.

        Raises:
            CheckpointError: a file is not what it should be. The shards that hold something of it are removed.
            OSError: a file cannot be read.
        """
        self.advance(complete)
        assert not self._waiting, f"{self._waiting} are not in the shards"
        wrong = {
            name: got for name, found in self._found.items() if (got := found.result()) != self._expected[name].sha256
        }
        if not wrong:
            return
        for file in {file for name in wrong for placed in self._parts[name] for file in placed.names}:
            (self._folder / file).unlink(missing_ok=True)  # two may finish a folder at once
        raise CheckpointError(wrong_file(self._expected[name], got) for name, got in wrong.items())

    def _digest(self, expected: Expected, parts: Sequence[Placed]) -> str:
        digest = hashlib.sha256()
        reader = getattr(self._readers, "one", None)
        if reader is None:
            reader = self._readers.one = ChunkReader(CHUNK_BYTES)
        try:
            for data in bytes_in_order(expected.described, parts, reader):
                digest.update(data)
                if self._stopped:
                    return ""
        except SourceChanged as changed:
            return str(changed)
        finally:
            reader.close()
        return digest.hexdigest()


def _copied(path: Path, size: int) -> Placed:
    """A file that is copied as it is."""
    return Placed(TensorCopy(size, (full_tensor(ByteRanges.of_file(path, size)),), ()), 0)


def _placed(
    new: NewShards, files: Sequence[SafetensorsFile], matrices: Mapping[str, Matrices], folder: Path
) -> Iterator[tuple[str, Placed]]:
    """Where each tensor of the checkpoint lies, by its name."""
    sizes = {tensor.name: tensor.stop - tensor.start for file in files for tensor in file.tensors}
    for of_ranks in new.layout.groups():
        ranges = [file.byte_ranges(folder) for file in of_ranks]
        for index, tensor in enumerate(of_ranks[0].tensors):
            if tensor.parameter is None:
                kept = (full_tensor(ranges[0][index]),)
                yield tensor.name, Placed(TensorCopy(tensor.size, kept, ()), 0)
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
                yield name, Placed(copy, offset)
                offset += sizes[name]


def wrong_file(expected: Expected, got: str) -> Fault:
    """The fault of a file that has not the SHA-256 that it should have, but `got`, or of which parts changed."""
    cached = isinstance(expected.stored, Path)
    again = f"remove {expected.stored.resolve()}, and " if isinstance(expected.stored, Path) else ""
    return Fault(
        code="wrong-sha256",
        what="a file in the hub's cache is not the one that the hub has"
        if cached
        else "a file that was fetched is not the one that the hub has",
        where=expected.name,
        got=got if " " in got else f"SHA-256 {got}",
        expected=f"SHA-256 {expected.sha256}",
        next=f"{again}run the command again: what was made of this file was removed, and is fetched again (where the "
        "folder is then refused as one of another source, remove it: the wrong bytes were among its samples)",
    )
