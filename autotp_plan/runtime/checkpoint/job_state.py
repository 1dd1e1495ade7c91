"""What the state of a job is: its mesh and plan, its steps, and the position in its data."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from autotp_plan.runtime.checkpoint.mesh_change import why_this_mesh_only
from autotp_plan.runtime.data.sampler import ResumableSampler
from autotp_plan.runtime.data.stream import StreamLoader
from autotp_plan.runtime.deepspeed.job_files import ENGINE_KEYS
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.saving_internals import SCRIPTS
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.jobs.job_lock import LOCK_NAME
from autotp_plan.schemas.jobs.job_manifest import LATEST_NAME, JobManifest
from autotp_plan.schemas.plan.document import Plan

MAX_TAG_BYTES = 200
"""Of a tag's name: file systems have 255, and temporary names are longer than what they stand for."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def position_of(engine: Any, ranks: Ranks) -> tuple[int, int] | None:
    """The epoch of the loader that `initialize` made, and the samples of it that all DP ranks together have seen."""
    source = data_source(engine)
    if source is None:
        return None
    size, drop_last = engine.train_micro_batch_size_per_gpu(), engine.dataloader_drop_last()
    epoch, start = source.position(batches_before(engine, ranks), size, drop_last)
    return epoch, start * ranks.dp_size


def batches_before(engine: Any, ranks: Ranks) -> int:
    """The batches that each DP rank would have had in all, had the job always run on this mesh."""
    batches: int = engine.global_samples // ranks.dp_size // engine.train_micro_batch_size_per_gpu()
    return batches


def data_source(engine: Any) -> ResumableSampler | StreamLoader | None:
    """What knows the position of the loader that `initialize` made."""
    loader = getattr(engine, "training_dataloader", None)
    source = loader if isinstance(loader, StreamLoader) else getattr(loader, "data_sampler", None)
    return source if isinstance(source, (ResumableSampler, StreamLoader)) else None


def check_tag(tag: str, folder: Path) -> None:
    """A tag names a folder inside `folder`, and nothing else; `latest` can name it in a line of text."""
    is_name = tag not in ("", ".", "..", LATEST_NAME, LOCK_NAME, *SCRIPTS) and "/" not in tag and "\\" not in tag
    is_line = tag == tag.strip() and tag.isprintable() and len(tag.encode(errors="replace")) <= MAX_TAG_BYTES
    if not is_name or not is_line:
        raise CheckpointError(
            Fault(
                what="a tag is not the name of a folder",
                where=str(folder),
                got=ascii(tag) if len(tag) < 100 else f"{len(tag)} characters: {tag[:40]!a}...",
                expected=f"a plain name of at most {MAX_TAG_BYTES} bytes, such as step100",
                next="leave out the tag: it is then the number of the step",
            )
        )


def check_client_state(client_state: dict[str, Any], folder: Path) -> None:
    """What the caller wants back can be saved, and takes the place of nothing that DeepSpeed saves."""
    faults = []
    for key, value in client_state.items():
        if not isinstance(key, str) or key in ENGINE_KEYS or _SURROGATE.search(key):
            faults.append(_unsavable(folder, f"the key {key!a}", "text that DeepSpeed does not use itself"))
            continue
        try:
            _DryPickler(_Nowhere(), protocol=2).dump(value)  # that of torch.save
        except Exception as error:  # whatever the value's own methods raise
            got = f"{key!r}: {type(error).__name__}: {error}"
            faults.append(_unsavable(folder, got, "values that can be pickled: numbers, text, tensors, lists, dicts"))
    if faults:
        raise CheckpointError(faults)


class _Nowhere:
    """A file that keeps nothing of what is written to it."""

    def write(self, data: bytes) -> int:
        return len(data)


class _DryPickler(pickle.Pickler):
    """Pickles all but the elements of tensors."""

    def persistent_id(self, value: Any) -> Any:
        return "tensor" if isinstance(value, torch.Tensor) else None


def _unsavable(folder: Path, got: str, expected: str) -> Fault:
    return Fault(
        code="client-state",
        what="client_state cannot be saved",
        where=f"save_checkpoint to {folder}",
        got=got,
        expected=expected,
        next="leave it out of client_state, or give another key or value",
    )


def about_engine(engine: Any, plan: Plan, ranks: Ranks) -> JobManifest:
    """The job of `engine` as a manifest describes it, without client state and files."""
    return JobManifest(
        plan=plan.fingerprint,
        tp_size=ranks.tp_size,
        dp_size=ranks.dp_size,
        zero_stage=engine.zero_optimization_stage(),
        position=position_of(engine, ranks),
        step=engine.global_steps,
        this_mesh_only=why_this_mesh_only(engine),
        client_state=(),
    )


def differences_of(saved: JobManifest, wanted: JobManifest) -> list[str]:
    """In which of plan, mesh and ZeRO stage two jobs differ."""
    keys = ("plan", "tp_size", "dp_size", "zero_stage")
    return [key for key in keys if getattr(saved, key) != getattr(wanted, key)]
