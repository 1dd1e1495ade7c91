"""Which tensors are copied from where to where, and in which chunks. Nothing here opens a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from autotp_plan.schemas.intervals import Copy, StridedCopies
from autotp_plan.schemas.plan.document import Parameter
from autotp_plan.schemas.shards.folder import ShardsFolder
from autotp_plan.schemas.shards.output_file import OutputFile
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import File
from autotp_plan.schemas.storage.safetensors_header import item_size


class StoredShard(NamedTuple):
    """Some or all of a tensor on disk: where the bytes are, and which bytes of the full tensor (`source`) they are."""

    ranges: ByteRanges
    copies: StridedCopies


class Matrices(NamedTuple):
    """Matrices of `rows` by `columns` elements of `item` bytes, one after the other."""

    rows: int
    columns: int
    item: int

    @property
    def size(self) -> int:
        """Bytes of one."""
        return self.rows * self.columns * self.item

    def transposed(self) -> Matrices:
        """The transposed matrices."""
        return Matrices(self.columns, self.rows, self.item)


def matrices_on_disk(parameter: Parameter, shape: tuple[int, ...]) -> Matrices | None:
    """The matrices that a parameter of `shape` is in a checkpoint, where these are transposed; None where not."""
    return Matrices(shape[-1], shape[-2], item_size(parameter.dtype)) if parameter.transposed else None


class TensorCopy(NamedTuple):
    """A tensor of `size` bytes that is copied from shards, which hold each byte once, to shards.

    Where it is read as `matrices`, they are transposed before they are written.
    """

    size: int
    sources: tuple[StoredShard, ...]
    targets: tuple[StoredShard, ...]
    matrices: Matrices | None = None

    def chunks(self, most: int) -> Iterator[tuple[int, int]]:
        """`[start, stop)` of at most `most` bytes each; full blocks where that can be, so that reads are long.

        Of matrices that are transposed at least one is read at a time, however large.
        """
        if self.matrices is not None:
            step = max(most // self.matrices.size, 1) * self.matrices.size if self.matrices.size else 1
            for start in range(0, self.size, step):
                yield start, min(start + step, self.size)
            return
        strides = [shard.copies.source_stride for shard in (*self.sources, *self.targets)]
        stride = max((stride for stride in strides if 0 < stride <= most), default=1)
        step = most // stride * stride
        for start in range(0, self.size, step):
            yield start, min(start + step, self.size)


class FileGroup(NamedTuple):
    """Files that are written together, and the tensors that fill them."""

    files: list[OutputFile]
    tensors: list[TensorCopy]

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return sum(tensor.size for tensor in self.tensors)


def full_tensor(ranges: ByteRanges) -> StoredShard:
    """A tensor that is stored as one string of bytes."""
    size = ranges.size
    copies = (Copy(0, 0, size),) if size else ()
    return StoredShard(ranges, StridedCopies(count=1, source_stride=size, target_stride=size, copies=copies))


def stored_shards(parameter: Parameter, shards: ShardsFolder) -> tuple[StoredShard, ...]:
    """Where a shards folder holds a parameter, every byte of it once."""
    layout = shards.plan.layouts[parameter.layout]
    found = []
    for rank in range(shards.plan.tp_size):
        copies = layout.first_held_copies(rank, item_size(parameter.dtype))
        if copies.copies:
            found.append(StoredShard(ByteRanges.of([shards.tensors[parameter.name, rank]]), copies))
    return tuple(found)


def file_copy(path: File, target: Path, size: int) -> FileGroup:
    """A file that is copied as it is."""
    sources, targets = ((full_tensor(ByteRanges.of_file(file, size)),) for file in (path, target))
    return FileGroup([OutputFile(target, size)], [TensorCopy(size, sources, targets)])
