"""Which files a shards folder has, and which tensor lies where in them: the same for the same plan and checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autotp_plan.schemas.layout import parameter_shape
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.manifest import Owner, owner_text, shard_file_name
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import ByteRange
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
    """A file of tensors one after the other. Of its header the length is known, before its source is."""

    name: str
    owner: int | Owner
    plan: str
    tensors: Sequence[PlacedTensor]

    def header(self, source: str) -> bytes:
        """What the file begins with, given the fingerprint of the source: always of the same length."""
        metadata = {
            "format": "pt",
            "autotp_plan": self.plan,
            "autotp_source": source,
            "tp_rank": owner_text(self.owner),
        }
        return header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors], metadata)

    def positions(self) -> list[int]:
        """The byte where each tensor begins, and last the size of the file."""
        positions = [len(self.header("sha256:" + 64 * "0"))]
        for tensor in self.tensors:
            positions.append(positions[-1] + tensor.size)
        return positions

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.positions()[-1]

    def byte_ranges(self, folder: Path) -> list[ByteRanges]:
        """Where each tensor lies."""
        path = folder / self.name
        return [
            ByteRanges((ByteRange(path, position, tensor.size),))
            for tensor, position in zip(self.tensors, self.positions())
        ]


class FileLayout:
    """The files of tensors of a shards folder.

    Args:
        plan: the plan of the shards.
        unused: the tensors that no rank reads.
        max_file_bytes: a file has at most as many bytes of tensors, or one tensor.
    """

    def __init__(self, plan: Plan, unused: Sequence[TensorEntry], max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.plan = plan
        parameters = sorted(plan.expanded(), key=lambda p: -BITS[p.dtype])  # so that each tensor is aligned
        sharded = [p for p in parameters if plan.layouts[p.layout].dim is not None]
        replicated = [p for p in parameters if plan.layouts[p.layout].dim is None]
        kept = sorted(unused, key=lambda tensor: -BITS[tensor.dtype])
        # grouped by the bytes of rank 0, which has the most of an uneven layout: the same groups on every rank
        self.sharded = _grouped(
            sharded, lambda p: num_bytes(p.dtype, plan.layouts[p.layout].rank_shape(0)), max_file_bytes
        )
        self.replicated = _grouped(replicated, lambda p: num_bytes(p.dtype, plan.shape_of(p)), max_file_bytes)
        self.unused = _grouped(kept, lambda tensor: num_bytes(tensor.dtype, tensor.shape), max_file_bytes)

    def groups(self) -> Iterator[list[PlacedFile]]:
        """All files, those with the ranks' shards of the same parameters together, by rank."""
        for part, parameters in enumerate(self.sharded):
            yield [
                self._file(rank, part, len(self.sharded), [self._shard(parameter, rank) for parameter in parameters])
                for rank in range(self.plan.tp_size)
            ]
        for part, parameters in enumerate(self.replicated):
            tensors = [self._shard(parameter, 0) for parameter in parameters]
            yield [self._file(Owner.ALL_RANKS, part, len(self.replicated), tensors)]
        for part, kept in enumerate(self.unused):
            tensors = [PlacedTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape) for tensor in kept]
            yield [self._file(Owner.NO_RANK, part, len(self.unused), tensors)]

    def files(self) -> Iterator[PlacedFile]:
        """All files."""
        for files in self.groups():
            yield from files

    def _shard(self, parameter: Parameter, rank: int) -> PlacedTensor:
        layout = self.plan.layouts[parameter.layout]
        shape = parameter_shape(self.plan.shape_of(parameter), layout.shape, layout.rank_shape(rank))
        return PlacedTensor(name=parameter.name, dtype=parameter.dtype, shape=shape, parameter=parameter)

    def _file(self, owner: int | Owner, part: int, num_parts: int, tensors: Sequence[PlacedTensor]) -> PlacedFile:
        name = shard_file_name(owner, self.plan.tp_size, part, num_parts)
        return PlacedFile(name=name, owner=owner, plan=self.plan.fingerprint, tensors=tensors)


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
