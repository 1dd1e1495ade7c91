"""One rank's weights from disk: a shards folder, or the original checkpoint, of which only the rank's bytes are read.

A pre-split tensor that stays on the CPU is mapped, a page of it read when it is used and copied when it is written to.
Every other tensor is read straight into its memory: the rank never holds more than its shard and the tensor at hand.
Everything that can be wrong with the files is found, on every rank alike, before the first tensor is read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, ShardsError
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import is_unfinished, read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from autotp_plan.schemas.shards.origin import fingerprint_of
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import ByteRange, Reader, local_path
from autotp_plan.schemas.storage.plan_fit import config_faults, tensor_faults
from autotp_plan.schemas.storage.safetensors_header import item_size
from autotp_plan.sources.model_folder import Place, model_folder, open_checkpoint

CHUNK_BYTES = 16 * 1024 * 1024

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A rank's shard of a parameter on disk.

    Attributes:
        name: the parameter.
        dtype: its dtype on disk, as safetensors calls it.
        shape: the shape of the shard.
        stored: the bytes of which the shard is some or all.
        layout: how the tensor of those bytes is sharded; replicated when they are the shard.
        tp_rank: the rank.
        full_shape: the shape of the parameter, where `stored` has its last two dimensions exchanged; None where not.
        mapped: whether those bytes may be the shard's memory: they are the shard, and nobody writes to them any more.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: ByteRanges
    layout: Layout
    tp_rank: int
    mapped: bool
    full_shape: tuple[int, ...] | None = None

    def byte_ranges(self) -> Iterator[ByteRange]:
        """The bytes of the shard, in its order."""
        for copy in self.layout.shard_copies(self.tp_rank, item_size(self.dtype)):
            yield from self.stored.slice(copy.source, copy.length)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A folder that was found to hold what a plan says. `of_rank` lists one rank's weights; no tensor is read yet.

    Attributes:
        plan: the plan.
        stored: by parameter and TP rank the bytes of which the shard is some or all.
        presplit: whether these bytes are the shard.
        mapped: whether a shard may be mapped.
        fingerprint: returns a hash of headers and of samples, which tells the weights from others of the same names
            and shapes. It is the same for a checkpoint and for shards of it.
    """

    plan: Plan
    stored: dict[tuple[str, int], ByteRanges]
    presplit: bool
    mapped: bool
    fingerprint: Callable[[], str]

    def of_rank(self, tp_rank: int) -> Iterator[Weight]:
        """The weights of one rank in the order of the plan."""
        for parameter in self.plan.expanded():
            layout = self.plan.layouts[parameter.layout]
            shape = parameter_shape(self.plan.shape_of(parameter), layout.shape, layout.rank_shape(tp_rank))
            yield Weight(
                name=parameter.name,
                dtype=parameter.dtype,
                shape=shape,
                stored=self.stored[parameter.name, tp_rank],
                layout=Layout(shape=shape) if self.presplit else layout,
                tp_rank=tp_rank,
                mapped=self.mapped,
                full_shape=layout.shape if parameter.transposed and not self.presplit else None,
            )


def open_weights(place: Place, plan: Plan, *, verify_checksums: bool = False, map_shards: bool = True) -> WeightSource:
    """Find out whether a folder holds a plan's parameters. Headers are read, tensors are not.

    Args:
        place: a shards folder, or the original checkpoint.
        plan: the plan.
        verify_checksums: read every byte of a shards folder; a checkpoint has no checksums.
        map_shards: what is pre-split may be mapped. A checkpoint never is, as it may be written to while a job trains.

    Raises:
        ShardsError: a shards folder that is not what its manifest and plan say.
        CheckpointError: a checkpoint that cannot be read.
        DocumentError: a manifest or plan that cannot be read.
        MismatchError: the folder is not the plan's. The same error on every rank, as all others.
    """
    dtype_faults = list(_dtype_faults(plan))
    found = model_folder(place)
    if is_unfinished(found.folder) or (found.folder / MANIFEST_NAME).exists():
        shards = read_shards(found.folder, plan)
        if dtype_faults:
            raise ShardsError(dtype_faults)
        if verify_checksums:
            shards.verify()
        stored = {key: ByteRanges.of([entry]) for key, entry in shards.tensors.items()}
        return WeightSource(
            plan=plan,
            stored=stored,
            presplit=True,
            mapped=map_shards,
            fingerprint=lambda: shards.manifest.source.fingerprint,
        )
    checkpoint = open_checkpoint(found)
    tensors = checkpoint.tensors
    faults = tensor_faults(plan, tensors) + dtype_faults
    if plan.model.config is not None:
        faults += config_faults(plan, checkpoint)
    if faults:
        raise MismatchError(faults)
    stored = {}
    for parameter in plan.expanded():
        full = ByteRanges.of([tensors[name] for name in parameter.names_on_disk()])
        stored.update({(parameter.name, rank): full for rank in range(plan.tp_size)})
    return WeightSource(
        plan=plan, stored=stored, presplit=False, mapped=False, fingerprint=lambda: fingerprint_of(checkpoint)
    )


def read_weight(weight: Weight, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A rank's shard of a parameter as a tensor.

    It is mapped, or read straight into its memory, where it can be; to another dtype or device it goes through a buffer
    of `CHUNK_BYTES`.

    Args:
        weight: where it is.
        device: the device of the tensor.
        dtype: what a floating-point tensor is converted to; None keeps the dtype on disk, as other tensors do.

    Raises:
        CheckpointError: a file ended early.
    """
    stored = DTYPES[weight.dtype]
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    direct = wanted == stored and device.type == "cpu"
    if direct and weight.mapped and weight.stored.size:
        return _map(weight, stored)
    if weight.full_shape is not None:
        return _read_transposed(weight, weight.full_shape, device, wanted)
    tensor = torch.empty(weight.shape, dtype=wanted, device=device)
    size = tensor.numel() if direct else min(tensor.numel(), CHUNK_BYTES // stored.itemsize)
    buffer = tensor.view(-1) if direct else torch.empty(size, dtype=stored)
    memory = memoryview(buffer.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    try:
        with Reader() as reader:
            for data in reader.read_through(memory, weight.byte_ranges()):
                count = len(data) // stored.itemsize
                if not direct:
                    tensor.view(-1)[done : done + count].copy_(buffer[:count])
                done += count
    except EOFError as error:
        raise CheckpointError(_short_read(weight, str(error))) from None
    assert done == tensor.numel(), f"{done} elements of {weight.name} were read"
    return tensor


def _read_transposed(weight: Weight, full: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A rank's shard of a parameter that is transposed on disk, a matrix at a time."""
    stored, layout = DTYPES[weight.dtype], weight.layout
    rows, columns = full[-2:]
    matrix = torch.empty((columns, rows), dtype=stored)
    memory = memoryview(matrix.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    numbers = torch.arange(math.prod(full[:-2])).view(full[:-2])
    if layout.dim is not None and layout.dim < len(full) - 2:  # of stacked matrices each rank has some
        numbers = _share(numbers, layout.dim, weight)
    tensor = torch.empty(weight.shape, dtype=dtype, device=device)
    parts = tensor.view(-1, *weight.shape[-2:])
    try:
        with Reader() as reader:
            for to, number in enumerate(numbers.flatten().tolist()):
                reader.read_into(memory, weight.stored.slice(number * len(memory), len(memory)))
                found = matrix.t()
                if layout.dim is not None and layout.dim >= len(full) - 2:
                    found = _share(found, layout.dim - (len(full) - 2), weight)
                parts[to].copy_(found)
    except EOFError as error:
        raise CheckpointError(_short_read(weight, str(error))) from None
    return tensor


def _share(tensor: Tensor, dim: int, weight: Weight) -> Tensor:
    """What the weight's rank has of `tensor` along `dim`."""
    intervals = weight.layout.intervals[weight.tp_rank]
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in intervals], dim)


def _map(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A pre-split shard as memory backed by its file. What is written to it stays in this process."""
    ((file, position, size),) = weight.byte_ranges()
    before = position % mmap.ALLOCATIONGRANULARITY
    try:
        with local_path(file).open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), before + size, access=mmap.ACCESS_COPY, offset=position - before)
    except ValueError as error:  # it is shorter than its header said
        raise CheckpointError(_short_read(weight, f"{file}: {error}")) from None
    pages.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=before).view(weight.shape)


def _dtype_faults(plan: Plan) -> Iterator[Fault]:
    for parameter in plan.expanded():
        if parameter.dtype not in DTYPES:
            yield Fault(
                code="unknown-dtype",
                what="torch has no such dtype",
                where=parameter.name,
                got=parameter.dtype,
                expected=", ".join(sorted(DTYPES)),
                next="use a checkpoint in a dtype that training uses, such as BF16",
            )


def _short_read(weight: Weight, got: str) -> Fault:
    return Fault(
        code="short-file",
        what="a file ended early while it was read",
        where=weight.name,
        got=got,
        expected=f"the {weight.stored.size} bytes of {weight.name}",
        next="do not write to the folder while a job reads it",
    )
