"""What a shards folder keeps of the original checkpoint besides the parameters, so that `merge` can give it back.

The headers of its files, to the byte; the tensors that no rank reads (a head that is tied, tables that are no
parameters); and the small files next to the weights.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.folder import ShardsFolder
from autotp_plan.schemas.shards.manifest import INDEX_COPY_NAME, PLAN_NAME, ShardFile, Source, SourceFile
from autotp_plan.schemas.shards.small_files import CopiedFile, small_files
from autotp_plan.schemas.storage.checkpoint import CONFIG_NAME, Checkpoint
from autotp_plan.schemas.storage.files import File, Reader, Span
from autotp_plan.schemas.storage.open_file import OpenFile
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, TensorEntry, parse_header

SAMPLE_BYTES = 4096
MAX_SAMPLES = 4096
"""Of a checkpoint, spread over its files: each sample of a file far away is a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """What is not sharded of a checkpoint: headers and fingerprint, tensors that no rank reads, and small files.

    `notes` are sentences on files that are not copied, and on links that were followed.
    """

    source: Source
    unused: tuple[TensorEntry, ...]
    copied: tuple[CopiedFile, ...]
    notes: tuple[str, ...] = ()


def original_of_checkpoint(checkpoint: Checkpoint, plan: Plan | None) -> Original:
    """What is not sharded of a checkpoint on disk; without a plan all of it.

    Raises:
        MismatchError: a file has a name that a manifest cannot hold.
        CheckpointError: a file cannot be read.
    """
    used = set() if plan is None else {name for one in plan.expanded() for name in one.names_on_disk()}
    try:
        small = small_files(checkpoint)
        return Original(
            source=source_of(checkpoint),
            unused=tuple(tensor for file in checkpoint.files for tensor in file.tensors if tensor.name not in used),
            copied=small.copied,
            notes=tuple(small.notes()),
        )
    except (OSError, EOFError) as error:
        raise CheckpointError(unreadable(error, checkpoint.folder)) from error


def unreadable(error: OSError | EOFError, folder: Path) -> Fault:
    """The fault of a checkpoint that cannot be read."""
    return Fault(
        code="unreadable-checkpoint",
        what="the checkpoint cannot be read",
        where=str(getattr(error, "filename", None) or folder),
        got=getattr(error, "strerror", None) or str(error),
        expected="files that can be read",
        next="correct what is wrong, and run the command again",
    )


def original_of_shards(shards: ShardsFolder) -> Original:
    """What a shards folder keeps of its original."""
    return Original(
        source=shards.manifest.source,
        unused=tuple(
            shards.unused[tensor.name]
            for file in shards.manifest.source.files
            for tensor in parse_header(shards.path / file.name, file.header).tensors
            if tensor.name in shards.unused
        ),
        copied=tuple(CopiedFile(file.name, shards.path / file.name, file.size) for file in copied_files(shards)),
    )


def kept_open(original: Original) -> Original:
    """The same, of files that stay open: they can be read when the folder has been removed or replaced.

    Args:
        original: of files on this machine.

    Raises:
        OSError: a file cannot be opened.
    """
    files: dict[File, OpenFile] = {}

    def opened(file: File) -> File:
        if file not in files and isinstance(file, Path):
            files[file] = OpenFile(file)
        return files.get(file, file)

    return replace(
        original,
        unused=tuple(replace(tensor, file=opened(tensor.file)) for tensor in original.unused),
        copied=tuple(file._replace(path=opened(file.path)) for file in original.copied),
    )


def copied_files(shards: ShardsFolder) -> list[ShardFile]:
    """The files of the original that were copied as they are, config.json and the index last."""
    files = [file for file in shards.manifest.files if file.owner is None and file.name != PLAN_NAME]
    return sorted(files, key=lambda file: (file.name in (CONFIG_NAME, INDEX_COPY_NAME), file.name))


def source_of(checkpoint: Checkpoint) -> Source:
    """The headers of a checkpoint, and a fingerprint over them and a sample of every tensor.

    Raises:
        MismatchError: a file has a name that a manifest cannot hold.
        OSError: a file cannot be read.
    """
    files = tuple(SourceFile(name=file.path.name, header=file.header) for file in checkpoint.files)
    hidden = [file.name for file in files if file.name.startswith(".") or not file.name.isprintable()]
    if hidden:
        raise MismatchError(
            Fault(
                code="checkpoint-file-name",
                what="a file of the checkpoint has a name that shards cannot remember",
                where=str(checkpoint.folder / hidden[0]),
                got=repr(hidden[0]),
                expected="a printable name that does not begin with a dot",
                next="rename the file, in the index too",
            )
        )
    return Source(fingerprint=fingerprint_of(checkpoint), files=files)


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """A hash of the headers of a checkpoint and of a sample of every tensor; of each n-th where there are very many.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        every = -(-len(checkpoint.tensors) // MAX_SAMPLES)
        samples = pool.map(lambda file: _sample(file, every), checkpoint.files)
        for file, sampled in zip(checkpoint.files, samples):
            for part in (file.path.name.encode(), file.header.encode(), sampled):
                digest.update(len(part).to_bytes(8, "little") + part)
    return f"sha256:{digest.hexdigest()}"


def _sample(file: SafetensorsFile, every: int) -> bytes:
    """A hash of the bytes in the middle of each `every`-th tensor: they change when a model is trained further."""
    spans = [_middle(tensor) for tensor in file.tensors[::every]]
    digest = hashlib.sha256()
    if isinstance(file.path, Path):
        with open(file.path, "rb", buffering=0) as opened:
            for span in spans:
                _take(digest, opened.fileno(), span, file.path)
        return digest.digest()
    samples = bytearray(sum(length for _, length in spans))
    with Reader() as reader:
        file.path.read_into(memoryview(samples), spans, reader)
    digest.update(samples)
    return digest.digest()


def _take(digest: Any, descriptor: int, span: Span, path: Path) -> None:
    """Put bytes of a file into a hash, however few of them a read brings."""
    start, left = span
    while left:
        data = os.pread(descriptor, left, start)
        if not data:
            raise EOFError(f"{path} ended {left} bytes early; it changed while it was read")
        digest.update(data)
        start, left = start + len(data), left - len(data)


def _middle(tensor: TensorEntry) -> Span:
    length = min(SAMPLE_BYTES, tensor.stop - tensor.start)
    return Span(tensor.start + (tensor.stop - tensor.start - length) // 2, length)
