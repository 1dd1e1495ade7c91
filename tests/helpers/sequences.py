"""Models whose residual stream is sharded along the sequence, beside the dense ones, in float64."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotp_plan.planner import Plan, compile_plan
from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from autotp_plan.runtime.verify.float64_passes import dense_reader, run_passes_and_steps, shard_reader
from tests.helpers.models import batch, eager_experts, load_dense, save_checkpoint


@dataclass(frozen=True)
class Lengths:
    """Batches of two rows by seed, of one length after another."""

    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join(map(str, self.lengths))

    def __call__(self, seed: int) -> Tensor:
        tokens: Tensor = replace(batch, length=self.lengths[seed % len(self.lengths)])(seed)
        return tokens


def save_case(work: Path, variant: str, tp_sizes: Sequence[int], *every: Lengths) -> None:
    """The checkpoint `variant/`, the plans `variant.tpN`, and the dense model's numbers of batches."""
    folder = save_checkpoint(work / variant, variant, torch.float64)
    for tp_size in tp_sizes:
        plan = with_sequence_parallel(compile_plan(folder, tp_size=tp_size))
        write(work, variant, tp_size, plan)
    for lengths in every:
        save_dense(work, variant, load_dense(folder, torch.float64, **eager_experts(torch.float64)), lengths)


def save_dense(work: Path, variant: str, dense: Any, batches: Any) -> None:
    """The numbers of a dense model in float64, `variant.LENGTHS.pt`."""
    names = [name for name, _ in dense.named_parameters()]
    numbers = run_passes_and_steps(dense, dense_reader(dense), names, batches)
    name = f"{variant}.{batches}.pt" if isinstance(batches, Lengths) else f"{variant}.pt"
    torch.save((batches, numbers), work / name)


def errors(
    work: Path, cases: Mapping[str, str], tp_size: int, lengths: Lengths | None = None
) -> dict[str, dict[str, float]]:
    """Inside a rank: by case, a plan `case.tpN` of a variant, the errors against the dense model's numbers.

    A model that does not run has an infinite error, under the message.
    """
    from autotp_plan.runtime import TrainingPlan
    from autotp_plan.runtime.verify import compare

    found: dict[str, dict[str, float]] = {}
    for case, variant in cases.items():
        plan = TrainingPlan(read(work, case, tp_size))
        name = f"{variant}.pt" if lengths is None else f"{variant}.{lengths}.pt"
        batches, dense = torch.load(work / name, weights_only=False)
        options: Any = eager_experts(torch.float64)
        try:
            model = plan.load_model(work / variant, dtype=torch.float64, **options).train()
            numbers = run_passes_and_steps(model, shard_reader(model), list(dense["stepped"]), batches)
        except Exception as error:  # what a wrong plan leads to
            found[case] = {f"{type(error).__name__}: {error}": float("inf")}
            continue
        by_kind = compare.errors(dense, numbers, plan.document, plan.ranks.tp_rank)
        found[case] = {f"{kind} {name}": error for kind, of in by_kind.items() for name, error in of.items()}
    return found


def read(work: Path, variant: str, tp_size: int) -> Plan:
    plan: Plan = pickle.loads((work / f"{variant}.tp{tp_size}").read_bytes())
    return plan


def write(work: Path, case: str, tp_size: int, plan: Plan) -> None:
    """Write a plan for `errors`: not as a document, which would be refused for an error that is planted."""
    (work / f"{case}.tp{tp_size}").write_bytes(pickle.dumps(plan))
