"""One rank's weights from disk: a shards folder, or the original checkpoint cut as it is read.

A pre-split tensor that stays on the CPU is mapped, a page of it read when it is used and copied when it is written to.
Every other tensor is read straight into its own memory, byte run by byte run: the rank never holds more than its shard
and the tensor at hand. Everything that can be wrong with the files is found, on every rank alike, before the first is
read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, ShardsError
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.plan.document import Parameter, Plan
from autotp_plan.schemas.shards.folder import is_unfinished, read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from autotp_plan.schemas.storage.byte_ranges import SegmentReader, Segments
from autotp_plan.schemas.storage.checkpoint import read_checkpoint
from autotp_plan.schemas.storage.plan_fit import config_faults, tensor_faults
from autotp_plan.schemas.storage.safetensors_header import runs

CHUNK_BYTES = 16 * 1024 * 1024

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A parameter's shard on disk: the bytes that hold it, which part of those is wanted, and the shard's shape.

    `mapped` when those bytes are the shard, in a file that nobody writes to any more, and may be its memory.
    """

    name: str
    source: Segments
    layout: Layout
    wanted: iv.Intervals
    shape: tuple[int, ...]
    mapped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A folder that was found to hold what a plan says. `of_rank` lists one rank's weights; nothing is read yet."""

    folder: Path
    plan: Plan
    sources: dict[tuple[str, int], Segments]
    presplit: bool
    mapped: bool

    def of_rank(self, tp_rank: int) -> Iterator[Weight]:
        """The weights of one rank in the order of the plan."""
        for parameter in self.plan.expanded():
            layout = self.plan.layouts[parameter.layout]
            shape = parameter_shape(self.plan.shape_of(parameter), layout.shape, layout.rank_shape(tp_rank))
            source = self.sources[parameter.name, tp_rank]
            held = Layout(shape=shape) if self.presplit else layout
            yield Weight(
                name=parameter.name,
                source=source,
                layout=held,
                wanted=held.rank_intervals(tp_rank),
                shape=shape,
                mapped=self.mapped,
            )


def open_weights(folder: Path, plan: Plan, *, verify_checksums: bool = False, map_shards: bool = True) -> WeightSource:
    """Find out whether `folder` holds the plan's parameters, as shards or as the original checkpoint.

    `verify_checksums` reads every byte of a shards folder; a checkpoint has no checksums. With `map_shards` what is
    pre-split may be mapped; a checkpoint is always read, as it may be written to while it is trained from. Raises
    ShardsError, CheckpointError, DocumentError or MismatchError, the same on every rank.
    """
    if is_unfinished(folder) or (folder / MANIFEST_NAME).exists():
        shards = read_shards(folder, plan)
        faults = [fault for parameter in plan.expanded() for fault in _dtype_faults(parameter)]
        if faults:
            raise ShardsError(faults)
        if verify_checksums:
            shards.verify()
        sources = {key: Segments.of(key[0], [entry]) for key, entry in shards.tensors.items()}
        return WeightSource(folder=folder, plan=plan, sources=sources, presplit=True, mapped=map_shards)
    return WeightSource(folder=folder, plan=plan, sources=_checkpoint(folder, plan), presplit=False, mapped=False)


def read_weight(weight: Weight, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """The shard as a tensor on `device`, converted when `dtype` is given and it is a floating-point tensor.

    Mapped, or read straight into its memory, where it can be; to another dtype or device it goes through a buffer of
    `CHUNK_BYTES`.
    """
    stored = DTYPES[weight.source.dtype]
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    direct = wanted == stored and device.type == "cpu"
    if direct and weight.mapped and weight.source.size:
        return _map(weight, stored)
    tensor = torch.empty(weight.shape, dtype=wanted, device=device)
    size = tensor.numel() if direct else min(tensor.numel(), CHUNK_BYTES // stored.itemsize)
    buffer = tensor.view(-1) if direct else torch.empty(size, dtype=stored)
    with SegmentReader(weight.source) as segments:
        reader = _Reader(segments, weight)
        for start in range(0, tensor.numel(), max(1, size)):
            part = buffer[: min(size, tensor.numel() - start)]
            reader.read_into(memoryview(part.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            if not direct:
                tensor.view(-1)[start : start + len(part)].copy_(part)
    return tensor


def _map(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A pre-split shard as memory backed by its file. What is written to it stays in this process."""
    ((file, position, size),) = weight.source.ranges(0, weight.source.size)
    before = position % mmap.ALLOCATIONGRANULARITY
    try:
        with file.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), before + size, access=mmap.ACCESS_COPY, offset=position - before)
    except ValueError as error:  # it is shorter than its header said
        raise CheckpointError(_short_read(weight, f"{file}: {error}")) from None
    pages.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=before).view(weight.shape)


class _Reader:
    """Reads the byte runs of a shard one after the other, as much at a time as is asked for."""

    def __init__(self, segments: SegmentReader, weight: Weight) -> None:
        self.segments, self.weight = segments, weight
        self.runs = runs(weight.layout, weight.wanted, weight.source.dtype)
        self.position = self.left = 0

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with the next bytes. Raises CheckpointError when the file ends before."""
        filled = 0
        while filled < len(target):
            if not self.left:
                self.position, self.left = next(self.runs)
            count = min(self.left, len(target) - filled)
            try:
                self.segments.read_into(target[filled : filled + count], self.position)
            except EOFError as error:
                raise CheckpointError(_short_read(self.weight, str(error))) from None
            filled, self.position, self.left = filled + count, self.position + count, self.left - count


def _checkpoint(folder: Path, plan: Plan) -> dict[tuple[str, int], Segments]:
    tensors = read_checkpoint(folder).tensors
    faults = [*tensor_faults(plan, tensors), *(fault for one in plan.expanded() for fault in _dtype_faults(one))]
    if plan.model.config is not None:
        faults += config_faults(plan, folder)
    if faults:
        raise MismatchError(faults)
    sources: dict[tuple[str, int], Segments] = {}
    for parameter in plan.expanded():
        source = Segments.of(parameter.name, [tensors[name] for name in parameter.names_on_disk()])
        sources.update({(parameter.name, rank): source for rank in range(plan.tp_size)})
    return sources


def _dtype_faults(parameter: Parameter) -> Iterator[Fault]:
    if parameter.dtype not in DTYPES:
        yield Fault(
            what="torch has no such dtype",
            where=parameter.name,
            got=parameter.dtype,
            expected=", ".join(sorted(DTYPES)),
            next="use a checkpoint in a dtype that training uses, such as BF16",
        )


def _short_read(weight: Weight, got: str) -> Fault:
    return Fault(
        what="a file ended early while it was read",
        where=weight.name,
        got=got,
        expected=f"the {weight.source.size} bytes of {weight.name}",
        next="do not write to the folder while a job reads it",
    )
