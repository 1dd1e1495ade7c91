"""What shards remember of the checkpoint that they were cut from: its headers, and a fingerprint."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

from autotp_plan.schemas.checkpoint import Checkpoint
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.manifest import Source, SourceFile
from autotp_plan.schemas.safetensors_file import SafetensorsFile

SAMPLE_BYTES = 4096


def source_of(checkpoint: Checkpoint) -> Source:
    """The headers of the checkpoint, and a fingerprint over them and a sample of every tensor.

    Raises MismatchError for a file name that a manifest cannot hold, OSError when a file cannot be read.
    """
    files = tuple(SourceFile(name=file.path.name, header=file.header) for file in checkpoint.files)
    hidden = [file.name for file in files if file.name.startswith(".") or not file.name.isprintable()]
    if hidden:
        raise MismatchError(
            Fault(
                what="a file of the checkpoint has a name that shards cannot remember",
                where=str(checkpoint.folder / hidden[0]),
                got=repr(hidden[0]),
                expected="a printable name that does not begin with a dot",
                next="rename the file, in the index too",
            )
        )
    digest = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        for file, sampled in zip(files, pool.map(_sample, checkpoint.files)):
            for part in (file.name.encode(), file.header.encode(), sampled):
                digest.update(len(part).to_bytes(8, "little") + part)
    return Source(fingerprint=f"sha256:{digest.hexdigest()}", files=files)


def _sample(file: SafetensorsFile) -> bytes:
    """A hash of the bytes in the middle of every tensor: a model that was trained further has others."""
    digest = hashlib.sha256()
    with open(file.path, "rb", buffering=0) as opened:
        for tensor in file.tensors:
            length = min(SAMPLE_BYTES, tensor.stop - tensor.start)
            middle = tensor.start + (tensor.stop - tensor.start - length) // 2
            digest.update(os.pread(opened.fileno(), length, middle))
    return digest.digest()
