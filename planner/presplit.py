"""Cutting a checkpoint into per-rank safetensors files, as bytes: no dtype is decoded, no tensor is held whole.

One process. Every source byte is read once, in pieces of at most `CHUNK_BYTES` per worker, and written straight to the
ranks that hold it. Files bear their final name only when they are complete and synced; the manifest comes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from autotp_plan.planner.check import check_checkpoint, check_plan
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.checkpoint import INDEX_NAME, read_checkpoint
from autotp_plan.schemas.documents import write_atomically
from autotp_plan.schemas.errors import Fault, MismatchError, ShardsError
from autotp_plan.schemas.layout import Layout, parameter_shape
from autotp_plan.schemas.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
    ShardFile,
    SourceFile,
    rank_file_name,
)
from autotp_plan.schemas.plan import Parameter, Plan
from autotp_plan.schemas.safetensors_file import BITS, header_bytes, num_bytes
from autotp_plan.schemas.segments import SegmentReader, Segments

CHUNK_BYTES = 8 * 1024 * 1024
MAX_FILE_BYTES = 4 * 1024**3
MAX_COPIED_BYTES = 256 * 1024 * 1024
MAX_PIECES = 1024  # most systems' IOV_MAX

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as source bytes are cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """A parameter to cut: where its bytes are, how it is cut, what its shards are called."""

    parameter: Parameter
    layout: Layout
    source: Segments


@dataclass(kw_only=True)
class _Output:
    """A file being written under a temporary name: its descriptor and where each tensor's bytes begin."""

    path: Path
    rank: int | None
    temporary: Path
    descriptor: int
    offsets: dict[str, int]
    size: int
    pieces: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)


def presplit(
    plan: Plan,
    checkpoint_folder: Path,
    output: Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 4,
    progress: Progress | None = None,
) -> Manifest:
    """Cut the checkpoint in `checkpoint_folder` by `plan` into the new folder `output`; returns its manifest.

    Args:
        max_file_bytes: a rank's tensors are spread over several files when they are more than this.
        workers: tensors cut at the same time.
        progress: called as source bytes are cut, from worker threads.

    Raises MismatchError when plan and checkpoint do not belong together, ShardsError when `output` cannot be written.
    Nothing remains of an attempt that fails.
    """
    faults = check_plan(plan) + check_checkpoint(plan, checkpoint_folder)
    if faults:
        raise MismatchError(faults)
    if workers < 1 or max_file_bytes < 1:
        raise ShardsError(_fault("presplit", f"workers {workers}, file size {max_file_bytes}", "positive numbers"))
    created = _create(output)
    try:
        return _cut_all(plan, checkpoint_folder, output, max_file_bytes, workers, progress)
    except BaseException as error:
        _remove(output, created)
        if isinstance(error, (OSError, EOFError)):
            got = getattr(error, "strerror", None) or str(error)
            raise ShardsError(
                _fault(str(output), got, "to read the checkpoint and write the shards",
                       "free space or correct the permissions, and run presplit again")
            ) from error  # fmt: skip
        raise


def _cut_all(
    plan: Plan, folder: Path, output: Path, max_file_bytes: int, workers: int, progress: Progress | None
) -> Manifest:
    checkpoint = read_checkpoint(folder)
    tensors = [
        _Tensor(
            parameter=p,
            layout=plan.layouts[p.layout],
            source=Segments.of(p.name, [checkpoint.tensors[name] for name in p.names_on_disk()]),
        )
        for p in plan.expanded()
    ]
    total = sum(tensor.source.size for tensor in tensors)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    files: list[ShardFile] = []
    owners: list[int | None] = [*range(plan.tp_size), None]
    grouped = {owner: _parts(tensors, owner, max_file_bytes) for owner in owners}
    most = max(len(grouped[rank]) for rank in range(plan.tp_size))
    for part in range(most):
        ranks = [rank for rank in range(plan.tp_size) if part < len(grouped[rank])]
        files += _write_part(
            plan, [(r, grouped[r][part], len(grouped[r])) for r in ranks], part, output, workers, advance
        )
    for part, members in enumerate(grouped[None]):
        files += _write_part(plan, [(None, members, len(grouped[None]))], part, output, workers, advance)
    files += _copy_others(folder, output)
    files.append(_write_text(output / PLAN_NAME, plan.to_json()))
    manifest = Manifest(
        plan=plan.fingerprint,
        tp_size=plan.tp_size,
        files=tuple(sorted(files, key=lambda file: file.name)),
        source=tuple(
            SourceFile(name=file.path.name, tensors=tuple(t.name for t in file.tensors), metadata=file.metadata)
            for file in checkpoint.files
        ),
    )
    _sync_folder(output)
    write_atomically(output / MANIFEST_NAME, manifest.to_json())
    _sync_folder(output)
    return manifest


def _parts(tensors: Sequence[_Tensor], owner: int | None, max_file_bytes: int) -> list[list[_Tensor]]:
    """The tensors of one rank (None: those every rank reads whole) in files of at most `max_file_bytes`.

    All ranks are grouped by the bytes of rank 0, the largest of an uneven cut, so that a part holds the same parameters
    on each. Wider dtypes come first, so that every tensor begins at a multiple of its element size.
    """
    mine = [tensor for tensor in tensors if (tensor.layout.dim is None) == (owner is None)]
    mine.sort(key=lambda tensor: -BITS[tensor.source.dtype])
    parts: list[list[_Tensor]] = []
    filled = 0
    for tensor in mine:
        size = num_bytes(tensor.source.dtype, tensor.layout.rank_shape(0))
        if not parts or filled + size > max_file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += size
    return parts


def _write_part(
    plan: Plan,
    members: Sequence[tuple[int | None, list[_Tensor], int]],
    part: int,
    output: Path,
    workers: int,
    advance: Callable[[int], None],
) -> list[ShardFile]:
    """Write one part of each rank's files, reading each source byte once; they get their final names together."""
    outputs: list[_Output] = []
    try:
        for rank, tensors, num_parts in members:
            path = output / rank_file_name(rank, plan.tp_size, part, num_parts)
            outputs.append(_open(path, rank, tensors, plan))
        with ThreadPoolExecutor(workers) as pool:
            pending = [pool.submit(_cut, tensor, outputs, advance) for tensor in members[0][1]]
            try:
                for future in pending:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for out in outputs:
                os.fsync(out.descriptor)
            digests = list(pool.map(lambda out: _sha256(out.temporary), outputs))
        for out in outputs:
            out.temporary.replace(out.path)
    finally:
        for out in outputs:
            os.close(out.descriptor)
            out.temporary.unlink(missing_ok=True)
    return [
        ShardFile(name=out.path.name, size=out.size, sha256=digest, rank=out.rank)
        for out, digest in zip(outputs, digests)
    ]


def _open(path: Path, rank: int | None, tensors: Sequence[_Tensor], plan: Plan) -> _Output:
    pieces = []
    for tensor in tensors:
        view, shape = tensor.layout.shape, plan.shape_of(tensor.parameter)
        local = parameter_shape(shape, view, tensor.layout.rank_shape(rank or 0))
        pieces.append((tensor.parameter.name, tensor.source.dtype, local))
    metadata = {"format": "pt", "autotp_plan": plan.fingerprint, "tp_rank": "all" if rank is None else str(rank)}
    header = header_bytes(pieces, metadata)
    offsets, at = {}, len(header)
    for name, dtype, local in pieces:
        offsets[name] = at
        at += num_bytes(dtype, local)
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write(descriptor, [memoryview(header)], 0)
        os.truncate(descriptor, at)
    except BaseException:
        os.close(descriptor)
        raise
    return _Output(path=path, rank=rank, temporary=temporary, descriptor=descriptor, offsets=offsets, size=at)


def _cut(tensor: _Tensor, outputs: Sequence[_Output], advance: Callable[[int], None]) -> None:
    """Read one tensor in chunks and write each chunk's pieces to the outputs that hold them."""
    layout, source = tensor.layout, tensor.source
    dim = layout.dim or 0
    size = layout.shape[dim] if layout.shape else 1
    inner = math.prod(layout.shape[dim + 1 :]) * (BITS[source.dtype] // 8)
    name = tensor.parameter.name
    with SegmentReader(source) as reader:
        for block, start, count, rows in _chunks(source.size, size, inner):
            chunk = memoryview(bytearray(count * rows * inner))
            reader.read_into(chunk, (block * size + start) * inner)
            for out in outputs:
                wanted = layout.rank_intervals(out.rank or 0) or ((0, 1),)
                local = iv.length(wanted)
                pieces = iv.pieces(((start, start + rows),), wanted)
                if not pieces:
                    continue
                base = out.offsets[name] + block * local * inner
                if count > 1:
                    views = [
                        chunk[(row * size + at) * inner : (row * size + at + length) * inner]
                        for row in range(count)
                        for at, _, length in pieces
                    ]
                    _write(out.descriptor, views, base)
                else:
                    for at, to, length in pieces:
                        _write(out.descriptor, [chunk[at * inner : (at + length) * inner]], base + to * inner)
            advance(len(chunk))


def _chunks(total: int, size: int, inner: int) -> Iterator[tuple[int, int, int, int]]:
    """`(first block, first index, number of blocks, indices)` of pieces of at most CHUNK_BYTES (or one index).

    A block is one run of the cut dimension; either several whole blocks are read at a time, or part of one.
    """
    if total == 0:
        return
    blocks = total // (size * inner)
    per_chunk = CHUNK_BYTES // (size * inner)
    if per_chunk >= 1:
        for block in range(0, blocks, per_chunk):
            yield block, 0, min(per_chunk, blocks - block), size
        return
    step = max(1, CHUNK_BYTES // inner)
    for block in range(blocks):
        for start in range(0, size, step):
            yield block, start, 1, min(step, size - start)


def _write(descriptor: int, views: Sequence[memoryview], offset: int) -> None:
    for first in range(0, len(views), MAX_PIECES):
        pending = list(views[first : first + MAX_PIECES])
        while pending:
            written = os.pwritev(descriptor, pending, offset)
            offset += written
            while pending and written >= len(pending[0]):
                written -= len(pending.pop(0))
            if written:
                pending[0] = pending[0][written:]


def _copy_others(folder: Path, output: Path) -> list[ShardFile]:
    """Copy config, tokenizer and generation files: all small files beside the weights, in name order."""
    copied = []
    for path in sorted(folder.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        index = path.name == INDEX_NAME or path.name.endswith(".index.json")
        hidden = path.name.startswith(".") or path.name in (MANIFEST_NAME, PLAN_NAME) or not path.name.isprintable()
        if weights or index or hidden or not path.is_file() or path.stat().st_size > MAX_COPIED_BYTES:
            continue
        temporary = output / f".{path.name}.tmp"
        shutil.copyfile(path, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(output / path.name)
        copied.append(_describe(output / path.name))
    return copied


def _write_text(path: Path, text: str) -> ShardFile:
    write_atomically(path, text)
    return _describe(path)


def _describe(path: Path) -> ShardFile:
    return ShardFile(name=path.name, size=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _create(output: Path) -> list[Path]:
    """Make the folder; the folders that were not there before, the deepest first."""
    try:
        if output.is_dir() and not any(output.iterdir()):
            return []
        if output.exists():
            what = "a folder that is not empty" if output.is_dir() else "a file"
            raise ShardsError(_fault(str(output), what, "a new folder", "give another folder, or remove this one"))
        missing = [folder for folder in (output, *output.parents) if not folder.exists()]
        output.mkdir(parents=True)
    except OSError as error:
        raise ShardsError(_fault(str(output), error.strerror or str(error), "a folder that can be made")) from None
    return missing


def _remove(output: Path, created: Sequence[Path]) -> None:
    for path in output.iterdir():
        path.unlink()
    for folder in created:
        with contextlib.suppress(OSError):  # another process may have begun to use a folder above
            folder.rmdir()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(where: str, got: str, expected: str, next_step: str = "correct it and run presplit again") -> Fault:
    return Fault(what="the shards cannot be written", where=where, got=got, expected=expected, next=next_step)
