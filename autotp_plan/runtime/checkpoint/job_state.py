"""What the state of a job is: its mesh and plan, its steps, and the position in its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotp_plan.runtime.checkpoint.mesh_change import why_this_mesh_only
from autotp_plan.runtime.data.sampler import ResumableSampler
from autotp_plan.runtime.data.stream import StreamLoader
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.jobs.job_manifest import LATEST_NAME, JobManifest
from autotp_plan.schemas.plan.document import Plan


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
    """A tag names a folder inside `folder`, and nothing else."""
    if tag in ("", ".", "..") or "/" in tag or "\\" in tag or "\0" in tag or tag == LATEST_NAME:
        raise CheckpointError(
            Fault(
                what="a tag is not the name of a folder",
                where=str(folder),
                got=repr(tag),
                expected="a plain name, such as step100",
                next="leave out the tag: it is then the number of the step",
            )
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
