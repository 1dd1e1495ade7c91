"""One rank's weights on disk: in a shards folder, or in the original checkpoint, of which it needs only some bytes.

Everything that can be wrong with the files is found, on every rank alike, before the first tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from autotp_plan.schemas.errors import Fault, MismatchError, ShardsError
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import ShardsFolder, is_unfinished, read_shards
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from autotp_plan.schemas.shards.origin import Original, fingerprint_of, kept_open, original_of_shards
from autotp_plan.schemas.storage.byte_ranges import ByteRanges
from autotp_plan.schemas.storage.files import ByteRange
from autotp_plan.schemas.storage.plan_fit import config_faults, tensor_faults
from autotp_plan.schemas.storage.safetensors_header import item_size
from autotp_plan.sources.model_folder import ModelFolder, Place, model_folder, open_checkpoint

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

MAX_COMPARED_BYTES = 64 * 1024 * 1024
"""Of a shards folder, files without tensors that are not larger have their checksums compared whenever it is loaded."""


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
        of_one_rank: whether no other rank needs some of these bytes.
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
    of_one_rank: bool = False
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
        original: of a shards folder what else a save writes; None of a checkpoint.
    """

    plan: Plan
    stored: dict[tuple[str, int], ByteRanges]
    presplit: bool
    mapped: bool
    fingerprint: Callable[[], str]
    original: Original | None = None

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
                of_one_rank=self.presplit and layout.dim is not None,
                full_shape=layout.shape if parameter.transposed and not self.presplit else None,
            )


def open_weights(
    place: Place, plan: Plan, *, verify_checksums: bool = False, map_shards: bool = True, keep_open: bool = False
) -> WeightSource:
    """Find out whether a folder holds a plan's parameters. Headers and small files are read, tensors are not.

    Args:
        place: a shards folder, or the original checkpoint.
        plan: the plan.
        verify_checksums: read every byte of a shards folder; a checkpoint has no checksums.
        map_shards: what is pre-split may be mapped. A checkpoint never is, as it may be written to while a job trains.
        keep_open: keep the files of a shards folder open that `original` is of, so that it may be removed.

    Raises:
        ShardsError: a shards folder that is not what its manifest and plan say.
        CheckpointError: a checkpoint that cannot be read.
        DocumentError: a manifest or plan that cannot be read.
        MismatchError: the folder is not the plan's. The same error on every rank, as all others.
        OSError: a file to keep open cannot be opened.
    """
    dtype_faults = list(_dtype_faults(plan))
    found = model_folder(place)
    if is_unfinished(found.folder) or (found.folder / MANIFEST_NAME).exists():
        shards = read_shards(found.folder, plan)
        if dtype_faults:
            raise ShardsError(dtype_faults)
        if faults := _config_faults(plan, found):
            raise MismatchError(faults)
        shards.verify(names=None if verify_checksums else _small_files(shards))
        original = original_of_shards(shards)
        stored = {key: ByteRanges.of([entry]) for key, entry in shards.tensors.items()}
        return WeightSource(
            plan=plan,
            stored=stored,
            presplit=True,
            mapped=map_shards,
            fingerprint=lambda: shards.manifest.source.fingerprint,
            original=kept_open(original) if keep_open else original,
        )
    checkpoint = open_checkpoint(found, plan.dequantized_dtype)
    tensors = checkpoint.tensors
    faults = tensor_faults(plan, tensors) + dtype_faults
    if plan.model.config is not None:
        faults += config_faults(plan, checkpoint.config, checkpoint.folder)
    if faults:
        raise MismatchError(faults)
    stored = {}
    for parameter in plan.expanded():
        full = ByteRanges.of([tensors[name] for name in parameter.names_on_disk()])
        stored.update({(parameter.name, rank): full for rank in range(plan.tp_size)})
    return WeightSource(
        plan=plan, stored=stored, presplit=False, mapped=False, fingerprint=lambda: fingerprint_of(checkpoint)
    )


def _config_faults(plan: Plan, shards: ModelFolder) -> list[Fault]:
    """Whether config.json of a shards folder is the plan's, of which the model is built."""
    if plan.model.config is None:
        return []
    next_step = "copy the folder again; or, if the config was meant to change, compile and pre-split again"
    return config_faults(plan, shards.config(), shards.folder, next_step)


def _small_files(shards: ShardsFolder) -> set[str]:
    """The files whose checksums are always compared: config, tokenizer and others without tensors."""
    return {file.name for file in shards.manifest.files if file.owner is None and file.size <= MAX_COMPARED_BYTES}


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
