"""A shards folder, and whether it is what its manifest and plan say.

What is cheap is always checked: that every file is there, and no other; sizes; headers; fingerprints of plan and
source. Checksums are checked where they are asked for. A folder may come from a stranger: nothing in it is followed,
executed or read unless it is a plain file directly in the folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError, ShardsError
from autotp_plan.schemas.layout import parameter_shape
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.without_stream import differ_in_stream_alone
from autotp_plan.schemas.shards.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    Manifest,
    Owner,
    ShardFile,
    owner_text,
)
from autotp_plan.schemas.shards.parts import find_parts, part_of
from autotp_plan.schemas.storage import checksum
from autotp_plan.schemas.storage.files import File
from autotp_plan.schemas.storage.plan_fit import parameter_faults
from autotp_plan.schemas.storage.safetensors_header import SafetensorsFile, TensorEntry, read_header


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsFolder:
    """A sound shards folder.

    Attributes:
        path: the folder.
        manifest: its manifest.
        plan: the plan of its shards.
        tensors: where each shard lies, by parameter and TP rank.
        unused: where the tensors lie that no rank reads, by name.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    tensors: dict[tuple[str, int], TensorEntry]
    unused: dict[str, TensorEntry]

    def verify(
        self, workers: int = 4, progress: checksum.Progress | None = None, names: Container[str] | None = None
    ) -> None:
        """Read every byte, and compare checksums.

        Args:
            workers: threads that read.
            progress: called with the bytes read and the bytes in all.
            names: the files to read; None for all.

        Raises:
            ShardsError: with every file that is not what was written.
        """
        files = [file for file in self.manifest.files if names is None or file.name in names]
        sizes = {self.path / file.name: file.size for file in files}
        found = checksum.of_files(sizes, workers=workers, progress=progress)
        faults = []
        for file in files:
            got = found[self.path / file.name]
            if not isinstance(got, int):
                text = getattr(got, "strerror", None) or str(got)
                faults.append(_fault(self.path / file.name, text, f"{file.size} bytes"))
            elif checksum.text(got) != file.crc32:
                faults.append(_fault(self.path / file.name, f"CRC-32 {checksum.text(got)}", f"CRC-32 {file.crc32}"))
        if faults:
            raise ShardsError(faults)


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` holds what an attempt to write shards left behind."""
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists():
        return False
    names = [path.name for path in folder.iterdir()]
    return any(
        name == JOURNAL_NAME or part_of(name) is not None or (name.startswith("tp-") and name.endswith(".safetensors"))
        for name in names
    )


def read_shards(folder: Path, plan: Plan | None = None) -> ShardsFolder:
    """The shards in a folder. Headers are read, tensors are not.

    Args:
        folder: a finished shards folder.
        plan: the plan that its shards must be of, but for where the stream is sharded along the sequence: no shard
            depends on that. None takes the plan in the folder.

    Raises:
        ShardsError: it is not finished, or not what its manifest and plan say.
        DocumentError: its manifest or plan cannot be read.
        MismatchError: its shards are of another plan.
    """
    if is_unfinished(folder):
        raise ShardsError(_unfinished_fault(folder))
    if os.path.lexists(folder / MANIFEST_NAME):
        _raise_if(_file_fault(folder / MANIFEST_NAME, None))
    manifest = Manifest.read(folder)
    faults = list(_listing_faults(folder, manifest))
    if faults:
        raise ShardsError(faults)
    plan_inside = Plan.read(folder / PLAN_NAME)
    plan = plan_inside if plan is None else plan
    expected = plan if plan_inside.fingerprint == manifest.plan else plan_inside
    if expected is plan and differ_in_stream_alone(plan, plan_inside):
        expected = plan_inside
    if (manifest.plan, manifest.tp_size) != (expected.fingerprint, plan.tp_size):
        raise MismatchError(
            Fault(
                code="shards-of-another-plan",
                what="the shards are of another plan",
                where=str(folder / MANIFEST_NAME),
                got=f"{manifest.plan} at TP={manifest.tp_size}",
                expected=f"{expected.fingerprint} at TP={plan.tp_size}",
                next="load the plan in the shards folder (autotp_plan.json), or pre-split with this one",
            )
        )
    return _read_headers(folder, manifest, plan)


def _read_headers(folder: Path, manifest: Manifest, plan: Plan) -> ShardsFolder:
    files = [file for file in manifest.files if file.owner is not None]
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda file: _header(folder / file.name), files))
    faults = [fault for fault in headers if isinstance(fault, Fault)]
    tensors: dict[tuple[str, int], TensorEntry] = {}
    unused: dict[str, TensorEntry] = {}
    for file, header in zip(files, headers):
        if isinstance(header, Fault):
            continue
        faults.extend(_metadata_faults(file, header, manifest))
        if file.owner is Owner.NO_RANK:
            unused.update({tensor.name: tensor for tensor in header.tensors})
            continue
        ranks = [file.owner] if isinstance(file.owner, int) else range(plan.tp_size)
        if ranks[-1] >= plan.tp_size:
            faults.append(_fault(header.path, f"a file of rank {file.owner}", f"ranks 0 to {plan.tp_size - 1}"))
            continue
        for rank in ranks:
            for tensor in header.tensors:
                if (tensor.name, rank) in tensors:
                    faults.append(_fault(header.path, f"{tensor.name} a second time", "every tensor once"))
                tensors[tensor.name, rank] = tensor
    faults = faults or list(_tensor_faults(tensors, plan))
    if faults:
        raise ShardsError(faults)
    return ShardsFolder(path=folder, manifest=manifest, plan=plan, tensors=tensors, unused=unused)


def _header(path: Path) -> SafetensorsFile | Fault:
    try:
        return read_header(path)
    except CheckpointError as error:
        return error.faults[0]


def _metadata_faults(file: ShardFile, header: SafetensorsFile, manifest: Manifest) -> Iterator[Fault]:
    found = header.metadata or {}
    if found.get("autotp_plan") != manifest.plan:
        yield _fault(header.path, "a file of another plan", manifest.plan)
    elif found.get("autotp_source") != manifest.source.fingerprint:
        yield _fault(header.path, "a file of another checkpoint", manifest.source.fingerprint)
    elif found.get("tp_rank") != (expected := owner_text(file.owner)):
        yield _fault(header.path, f"a file of rank {found.get('tp_rank')}", f"rank {expected}")


def _tensor_faults(tensors: dict[tuple[str, int], TensorEntry], plan: Plan) -> Iterator[Fault]:
    known: set[tuple[str, int]] = set()
    for parameter in plan.expanded():
        layout = plan.layouts[parameter.layout]
        one_tensor = replace(parameter, source=None, sources=None, transposed=False)
        for rank in range(plan.tp_size):
            key = (parameter.name, rank)
            known.add(key)
            shape = parameter_shape(plan.shape_of(parameter), layout.shape, layout.rank_shape(rank))
            stored = {parameter.name: tensors[key]} if key in tensors else {}
            for fault in parameter_faults(one_tensor, shape, stored, "give the folder that belongs to this plan"):
                yield replace(fault, where=f"rank {rank}: {fault.where}")
    for name, rank in tensors.keys() - known:
        yield Fault(
            code="shards-tensor-unknown",
            what="the shards have a tensor that the plan does not know",
            where=f"rank {rank}: {name}",
            expected="the plan's tensors only",
            next="give the folder that belongs to this plan",
        )


def _listing_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    names = [file.name for file in manifest.files]
    for name in sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        yield _fault(folder / MANIFEST_NAME, f"{name} twice", "every file once")
    if PLAN_NAME not in names:
        yield _fault(folder / MANIFEST_NAME, f"no {PLAN_NAME}", "the plan among the files")
    for file in manifest.files:
        fault = _file_fault(folder / file.name, file.size)
        if fault is not None:
            yield fault
    for name in sorted({path.name for path in folder.iterdir()} - {*names, MANIFEST_NAME}):
        if not name.startswith("."):
            got, expected = "a file that the manifest does not know", "the files of the manifest only"
            yield _fault(folder / name, got, expected, "move it somewhere else, or copy the folder again")


def _file_fault(path: Path, size: int | None) -> Fault | None:
    expected = "a file" if size is None else f"a file of {size} bytes"
    try:
        status = path.lstat()
    except OSError as error:
        return _fault(path, error.strerror or str(error), expected)
    if not stat.S_ISREG(status.st_mode):
        got = "a link" if stat.S_ISLNK(status.st_mode) else "no plain file"
        return _fault(path, got, expected, "copy the folder with the files in it, not links (cp -rL)")
    return None if size in (None, status.st_size) else _fault(path, f"{status.st_size} bytes", expected)


def _unfinished_fault(folder: Path) -> Fault:
    got, next_step = f"shards without {MANIFEST_NAME}", "run the command that was stopped again: it resumes"
    parts = find_parts(folder)
    if parts is not None:
        got = f"{got}: {parts}"
        commands = ", ".join(f"--part {number}/{parts.count}" for number in parts.missing[:20])
        next_step = f"run presplit again with {commands or f'--part 1/{parts.count}'}"
    return _fault(folder, got, "a finished shards folder", next_step)


def _raise_if(fault: Fault | None) -> None:
    if fault is not None:
        raise ShardsError(fault)


def _fault(where: File, got: str, expected: str, next_step: str = "copy the folder again, or pre-split again") -> Fault:
    return Fault(
        code="shards-differ",
        what="the shards folder is not what its manifest says",
        where=str(where),
        got=got,
        expected=expected,
        next=next_step,
    )
