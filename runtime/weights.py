"""One rank's weights from disk: a shards folder, or the original checkpoint cut as it is read.

A tensor is read straight into its own memory, byte run by byte run: the rank never holds more than its shard and the
tensor at hand. Everything that can be wrong with the files is found, on every rank alike, before the first is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.checkpoint import config_hash, read_checkpoint, read_config
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, ShardsError
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.manifest import MANIFEST_NAME, Manifest, ShardFile
from autotp_plan.schemas.plan import Parameter, Plan
from autotp_plan.schemas.safetensors_file import TensorEntry, read_header, runs

CHUNK_BYTES = 16 * 1024 * 1024

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A parameter's shard on disk: the tensor that holds it, which part of that is wanted, and the shard's shape."""

    name: str
    entry: TensorEntry
    layout: Layout
    wanted: iv.Intervals
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A folder that was found to hold what a plan says. `of_rank` lists one rank's weights; nothing is read yet."""

    folder: Path
    plan: Plan
    entries: dict[tuple[str, int], TensorEntry]
    presplit: bool

    def of_rank(self, tp_rank: int) -> Iterator[Weight]:
        """The weights of one rank in the order of the plan."""
        for parameter in self.plan.expanded():
            layout = self.plan.layouts[parameter.layout]
            shape = parameter_shape(self.plan.shape_of(parameter), layout.shape, layout.rank_shape(tp_rank))
            entry = self.entries[parameter.name, tp_rank]
            if self.presplit:
                whole = Layout(shape=entry.shape)
                yield Weight(
                    name=parameter.name, entry=entry, layout=whole, wanted=whole.rank_intervals(0), shape=shape
                )
            else:
                wanted = layout.rank_intervals(tp_rank)
                yield Weight(name=parameter.name, entry=entry, layout=layout, wanted=wanted, shape=shape)


def open_weights(folder: Path, plan: Plan) -> WeightSource:
    """Find out whether `folder` holds the plan's parameters, as shards or as the original checkpoint.

    Raises ShardsError, CheckpointError, DocumentError or MismatchError, the same on every rank.
    """
    if (folder / MANIFEST_NAME).exists():
        return WeightSource(folder=folder, plan=plan, entries=_shard_entries(folder, plan), presplit=True)
    unfinished = folder.is_dir() and any(path.name.startswith("tp-") for path in folder.iterdir())
    if unfinished:
        raise ShardsError(_shards_fault(str(folder), f"shards without {MANIFEST_NAME}", "a finished presplit"))
    return WeightSource(folder=folder, plan=plan, entries=_checkpoint_entries(folder, plan), presplit=False)


def read_weight(weight: Weight, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """The shard as a tensor on `device`, converted when `dtype` is given and it is a floating-point tensor.

    Read straight into its memory where it can be; to another dtype or device it goes through a buffer of `CHUNK_BYTES`.
    """
    stored = DTYPES[weight.entry.dtype]
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    tensor = torch.empty(weight.shape, dtype=wanted, device=device)
    direct = wanted == stored and device.type == "cpu"
    size = tensor.numel() if direct else min(tensor.numel(), CHUNK_BYTES // stored.itemsize)
    buffer = tensor.view(-1) if direct else torch.empty(size, dtype=stored)
    descriptor = os.open(weight.entry.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        reader = _Reader(descriptor, weight)
        for start in range(0, tensor.numel(), max(1, size)):
            part = buffer[: min(size, tensor.numel() - start)]
            reader.read_into(memoryview(part.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            if not direct:
                tensor.view(-1)[start : start + len(part)].copy_(part)
    finally:
        os.close(descriptor)
    return tensor


class _Reader:
    """Reads the byte runs of a shard one after the other, as much at a time as is asked for."""

    def __init__(self, descriptor: int, weight: Weight) -> None:
        self.descriptor, self.weight = descriptor, weight
        self.runs = runs(weight.layout, weight.wanted, weight.entry.dtype)
        self.position = self.left = 0

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with the next bytes. Raises CheckpointError when the file ends before."""
        filled = 0
        while filled < len(target):
            if not self.left:
                offset, self.left = next(self.runs)
                self.position = self.weight.entry.start + offset
            end = min(filled + self.left, len(target))
            got = os.preadv(self.descriptor, [target[filled:end]], self.position)
            if got == 0:
                raise CheckpointError(_short_read(self.weight))
            filled, self.position, self.left = filled + got, self.position + got, self.left - got


def _shard_entries(folder: Path, plan: Plan) -> dict[tuple[str, int], TensorEntry]:
    manifest = Manifest.read(folder)
    if manifest.plan != plan.fingerprint or manifest.tp_size != plan.tp_size:
        raise MismatchError(
            Fault(
                what="the shards were cut by another plan",
                where=str(folder / MANIFEST_NAME),
                got=f"{manifest.plan} at TP={manifest.tp_size}",
                expected=f"{plan.fingerprint} at TP={plan.tp_size}",
                next="load the plan in the shards folder (autotp_plan.json), or pre-split with this one",
            )
        )
    faults = [fault for file in manifest.files if (fault := _size_fault(folder, file))]
    if faults:
        raise ShardsError(faults)
    entries: dict[tuple[str, int], TensorEntry] = {}
    weights = [file for file in manifest.files if file.rank != -1]
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda file: read_header(folder / file.name), weights))
    for file, header in zip(weights, headers):
        if (header.metadata or {}).get("autotp_plan") != plan.fingerprint:
            faults.append(_shards_fault(str(header.path), "a file cut by another plan", plan.fingerprint))
        for rank in range(plan.tp_size) if file.rank is None else [file.rank]:
            entries.update({(tensor.name, rank): tensor for tensor in header.tensors})
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        for rank in range(plan.tp_size):
            shape = parameter_shape(plan.shape_of(parameter), layout.shape, layout.rank_shape(rank))
            entry = entries.get((parameter.name, rank))
            faults.extend(_entry_faults(entry, f"rank {rank}: {parameter.name}", shape, parameter))
    if faults:
        raise ShardsError(faults)
    return entries


def _checkpoint_entries(folder: Path, plan: Plan) -> dict[tuple[str, int], TensorEntry]:
    checkpoint = read_checkpoint(folder)
    faults: list[Fault] = []
    entries: dict[tuple[str, int], TensorEntry] = {}
    for parameter in plan.expanded():
        name = parameter.source or parameter.name
        entry = checkpoint.tensors.get(name)
        found = _entry_faults(entry, name, plan.shape_of(parameter), parameter)
        faults.extend(found)
        if entry is not None:
            entries.update({(parameter.name, rank): entry for rank in range(plan.tp_size)})
    if plan.model.config is not None and config_hash(read_config(folder)) != plan.model.config:
        faults.append(
            Fault(
                what="config.json is not the one the plan was compiled from",
                where=str(folder / "config.json"),
                got=str(config_hash(read_config(folder))),
                expected=plan.model.config,
                next="compile a plan for this checkpoint",
            )
        )
    if faults:
        raise MismatchError(faults)
    return entries


def _entry_faults(
    entry: TensorEntry | None, where: str, shape: tuple[int, ...], parameter: Parameter
) -> Iterator[Fault]:
    if entry is None:
        yield Fault(
            what="a tensor of the plan is missing",
            where=where,
            expected=f"{parameter.dtype} of {list(shape)}",
            next="give the folder that belongs to this plan",
        )
    elif (entry.shape, entry.dtype) != (shape, parameter.dtype):
        yield Fault(
            what="a tensor is not what the plan says",
            where=where,
            got=f"{entry.dtype} of {list(entry.shape)}",
            expected=f"{parameter.dtype} of {list(shape)}",
            next="give the folder that belongs to this plan",
        )
    elif entry.dtype not in DTYPES:
        yield Fault(
            what="torch has no such dtype",
            where=where,
            got=entry.dtype,
            expected=", ".join(sorted(DTYPES)),
            next="use a checkpoint in a dtype that training uses, such as BF16",
        )


def _size_fault(folder: Path, file: ShardFile) -> Fault | None:
    try:
        size = (folder / file.name).stat().st_size
    except OSError as error:
        return _shards_fault(str(folder / file.name), error.strerror or str(error), f"{file.size} bytes")
    if size == file.size:
        return None
    return _shards_fault(str(folder / file.name), f"{size} bytes", f"{file.size} bytes")


def _shards_fault(where: str, got: str, expected: str) -> Fault:
    return Fault(
        what="the shards folder is not what its manifest says",
        where=where,
        got=got,
        expected=expected,
        next="copy the folder again, or pre-split again",
    )


def _short_read(weight: Weight) -> Fault:
    return Fault(
        what="a file ended early while it was read",
        where=str(weight.entry.file),
        got="fewer bytes than before",
        expected=f"the {weight.entry.stop - weight.entry.start} bytes of {weight.entry.name}",
        next="do not write to the folder while a job reads it",
    )
