"""Which files a shards folder has, and which tensor lies where in them: the same for the same plan and checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from autotp_plan.schemas.layout import parameter_shape
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.folder import rank_text
from autotp_plan.schemas.shards.manifest import ShardFile, owner_name, shard_file_name
from autotp_plan.schemas.storage.safetensors_header import BITS, TensorEntry, header_bytes, num_bytes

_T = TypeVar("_T")
MAX_FILE_BYTES = 4 * 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedTensor:
    """A tensor of a file: as its header has it, and the parameter it is a shard of, None where no rank reads it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: Parameter | None = None

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedFile:
    """A file of tensors one after the other; `rank` and `unused` as in a manifest."""

    name: str
    rank: int | None
    unused: bool
    tensors: Sequence[PlacedTensor]

    def header(self, plan: str, source: str) -> bytes:
        """What the file begins with, given the fingerprints of plan and source: always of the same length."""
        metadata = {
            "format": "pt",
            "autotp_plan": plan,
            "autotp_source": source,
            "tp_rank": rank_text(self.rank, self.unused),
        }
        return header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors], metadata)

    def positions(self, header: bytes) -> list[int]:
        """Where each tensor begins, and the size of the file."""
        positions = [len(header)]
        for tensor in self.tensors:
            positions.append(positions[-1] + tensor.size)
        return positions

    def entry(self, size: int, crc32: str) -> ShardFile:
        """The file as a manifest lists it."""
        return ShardFile(name=self.name, size=size, crc32=crc32, rank=self.rank, unused=self.unused)


class ShardLayout:
    """The files of tensors of a shards folder. Files of at most `max_file_bytes`, or of one tensor."""

    def __init__(self, plan: Plan, unused: Sequence[TensorEntry], max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.plan = plan
        parameters = sorted(plan.expanded(), key=lambda p: -BITS[p.dtype])  # so that each tensor begins at its size
        cut = [p for p in parameters if plan.layouts[p.layout].dim is not None]
        whole = [p for p in parameters if plan.layouts[p.layout].dim is None]
        kept = sorted(unused, key=lambda tensor: -BITS[tensor.dtype])
        # all ranks are grouped by the bytes of rank 0, the largest of an uneven cut: a part holds the same on each
        self.cut = _grouped(cut, lambda p: num_bytes(p.dtype, plan.layouts[p.layout].rank_shape(0)), max_file_bytes)
        self.whole = _grouped(whole, lambda p: num_bytes(p.dtype, plan.shape_of(p)), max_file_bytes)
        self.unused = _grouped(kept, lambda tensor: num_bytes(tensor.dtype, tensor.shape), max_file_bytes)

    def together(self) -> Iterator[list[PlacedFile]]:
        """All files, those of the ranks that hold shards of the same parameters together, by rank."""
        for index in range(len(self.cut)):
            yield [self._file(rank, index) for rank in range(self.plan.tp_size)]
        for index in range(len(self.whole)):
            yield [self._file(None, index)]
        for index, kept in enumerate(self.unused):
            tensors = [PlacedTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape) for tensor in kept]
            name = shard_file_name("unused", index, len(self.unused))
            yield [PlacedFile(name=name, rank=-1, unused=True, tensors=tensors)]

    def files(self) -> Iterator[PlacedFile]:
        """All files."""
        for files in self.together():
            yield from files

    def _file(self, rank: int | None, index: int) -> PlacedFile:
        groups = self.whole if rank is None else self.cut
        tensors = []
        for parameter in groups[index]:
            layout = self.plan.layouts[parameter.layout]
            shape = parameter_shape(self.plan.shape_of(parameter), layout.shape, layout.rank_shape(rank or 0))
            tensors.append(PlacedTensor(name=parameter.name, dtype=parameter.dtype, shape=shape, parameter=parameter))
        name = shard_file_name(owner_name(rank, self.plan.tp_size), index, len(groups))
        return PlacedFile(name=name, rank=rank, unused=False, tensors=tensors)


def _grouped(members: Sequence[_T], size_of: Callable[[_T], int], most: int) -> list[list[_T]]:
    """`members` in groups of at most `most` bytes, or of one."""
    groups: list[list[_T]] = []
    filled = 0
    for member in members:
        size = size_of(member)
        if not groups or filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(member)
        filled += size
    return groups
