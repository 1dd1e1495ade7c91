"""Many forwards and backwards without data, each in a process of its own, as many at a time as there are cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from autotp_plan.runtime.estimate.processes import TIMEOUT, run_without_data
from autotp_plan.schemas.estimate.step import Step, StepCase

MOST_PROCESSES = 8
"""Each of them takes half a GiB."""


def run_small_steps(
    cases: Sequence[StepCase], progress: Callable[[int, int], None] | None = None, timeout: float = TIMEOUT
) -> list[Step]:
    """Run a forward and backward of each case, with the attention that GPUs have, on tensors without data.

    Args:
        cases: what to run.
        progress: called with how many are done, and how many there are.
        timeout: seconds for as many as run at the same time.

    Returns:
        What each of them took.

    Raises:
        MismatchError: a plan has no config, or its model is not the one that transformers builds.
        CheckpointError: transformers cannot build the model.
        CompileError: the model's code does not run without data, or takes too long.
    """
    found: list[Step] = []
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0))))
    for start in range(0, len(cases), processes):
        some = cases[start : start + processes]
        where = f"TP={some[0].plan.tp_size}"
        found += run_without_data(_run_case, len(some), list(some), where=where, what="a step", timeout=timeout)
        if progress is not None:
            progress(len(found), len(cases))
    return found


def _run_case(cases: list[StepCase]) -> Step:
    """The case of this process, which leaves the process group of those that run beside it."""
    import torch

    from autotp_plan.runtime.estimate.fake_internals import fused_attention
    from autotp_plan.runtime.estimate.training_step import Batch, training_step

    case = cases[int(os.environ["RANK"])]
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    with fused_attention():
        return training_step(
            case.plan,
            case.tp_rank,
            dp_size=2,
            batch=Batch(sequences=case.sequences, length=case.length),
            activation_checkpointing=case.activation_checkpointing,
        )
