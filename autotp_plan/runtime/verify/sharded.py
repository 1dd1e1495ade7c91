"""The sharded side of the proof: what one rank does, by the same calls as a training job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from autotp_plan.runtime.loading.empty_model import build_planned
from autotp_plan.runtime.tensor_parallel.torch_internals import muon_orthogonalises_with
from autotp_plan.runtime.tensor_parallel.weight_reads import watch_reads
from autotp_plan.runtime.training_plan import load_plan
from autotp_plan.runtime.verify.compare import errors, partial_gradients
from autotp_plan.runtime.verify.compute_share import forward_operations
from autotp_plan.runtime.verify.dense import PLAN_NAME, About, options
from autotp_plan.runtime.verify.float64_passes import run_passes_and_steps, shard_reader
from autotp_plan.runtime.verify.optimizer_steps import Training, engine_steps, orthogonalised, relative_errors


def run_rank(folder: Path) -> None:
    """Compare this rank's numbers with the dense ones in `folder`; each part's errors are written when it is done."""
    about = About.read(folder)
    plan = load_plan(folder / "float64" / PLAN_NAME)
    rank = plan.init_mesh().tp_rank
    for attention in about.attention:
        dense = torch.load(folder / f"{attention}.pt", mmap=True)
        # a model that is given keeps the files' float64 where transformers would keep float32
        empty = build_planned(folder / "float64", plan.document, **options(attention))
        model = plan.load_model(folder / "float64", model=empty).train()
        with watch_reads() as reads:
            found = run_passes_and_steps(model, shard_reader(model), list(dense["stepped"]), about.batches)
        write_errors(folder / f"{attention}.reads-{rank}.json", reads)
        write_errors(folder / f"{attention}.rank-{rank}.json", errors(dense, found, plan.document, rank))
        partial = partial_gradients(dense, found, plan.document, plan.ranks.tp_group)
        write_errors(folder / f"{attention}.partial-{rank}.json", {"names": partial})
        if attention == about.attention[0]:
            write_errors(folder / f"compute.rank-{rank}.json", {"operations": forward_operations(model, about.batches)})
    plan = load_plan(folder / "float32" / PLAN_NAME)
    model = plan.load_model(folder / "float32", **options(about.attention[0])).train()
    with muon_orthogonalises_with(orthogonalised):
        steps = engine_steps(plan, model, Training(batches=about.batches, optimizer=about.optimizer))
    dense_steps = json.loads((folder / "engine.json").read_text())
    write_errors(folder / f"engine.rank-{rank}.json", relative_errors(dense_steps, steps))


def write_errors(path: Path, value: Any) -> None:
    """Write a file of what was found; it is not there before it is complete."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)
