"""python -m benchmarks.scale [--output docs]

How the cost of a training step grows: a Llama and a mixture of experts, one setting changed at a time. Each figure is
of a forward and backward of rank 0 that the runtime runs on tensors without data: no accelerator and little memory is
needed. Writes scale.json, scale.md and the charts; `--again` writes page and charts from scale.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.runtime.verify.workers import run_ranks
from benchmarks import scale_report

PLANS = Path(__file__).parent.parent / "autotp_plan" / "plans"
PACKAGES = ("autotp-plan", "torch", "deepspeed", "transformers")
HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A published model, of which sizes are changed.

    Attributes:
        name: as its authors write it.
        folder: in `autotp_plan/plans`.
        inner: the key of config.json that grows with the width, as the number of heads does.
    """

    name: str
    folder: str
    inner: str

    def config(self, setting: Setting) -> dict[str, Any]:
        """config.json with other sizes: heads of 128, as many KV heads as published."""
        published = json.loads((PLANS / self.folder / "config.json").read_text())
        inner = published[self.inner] * setting.width // published["hidden_size"]
        heads = published["num_attention_heads"] * setting.width // published["hidden_size"]
        sizes = {"hidden_size": setting.width, "num_hidden_layers": setting.layers, self.inner: inner}
        if setting.experts:
            sizes["num_experts"] = setting.experts
        return {**published, **sizes, "num_attention_heads": heads, "head_dim": HEAD_DIM}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What can be changed. `experts` is 0 for a model without."""

    layers: int
    width: int
    tp: int = 4
    dp: int = 8
    length: int = 4096
    micro_batch: int = 1
    checkpointing: bool = False
    experts: int = 0


FAMILIES = {
    "llama": Family(name="Llama-3.1-8B", folder="llama_3_1_8b", inner="intermediate_size"),
    "moe": Family(name="Qwen3-30B-A3B", folder="qwen3_30b_a3b", inner="moe_intermediate_size"),
}
BASE = {"llama": Setting(layers=32, width=4096), "moe": Setting(layers=48, width=2048, experts=128)}


def sweeps(base: Setting) -> dict[str, list[Setting]]:
    """The settings of each table, by what is changed."""
    values: dict[str, list[Any]] = {
        "tp": [1, 2, 4, 8, 16],
        "dp": [1, 8, 64, 512],
        "layers": [base.layers // 4, base.layers // 2, base.layers, 2 * base.layers],
        "width": [base.width // 2, base.width, 2 * base.width, 4 * base.width],
        "length": [1024, 2048, 4096, 8192, 16384, 32768],
        "micro_batch": [1, 2, 4, 8],
    }
    if base.experts:
        values["experts"] = [base.experts // 4, base.experts // 2, base.experts, 2 * base.experts]
    found = {name: [dataclasses.replace(base, **{name: value}) for value in tried] for name, tried in values.items()}
    kept = [(length, again) for length in (base.length, 8 * base.length) for again in (False, True)]
    return {**found, "checkpointing": [dataclasses.replace(base, length=n, checkpointing=again) for n, again in kept]}


def measure(family: str, setting: Setting) -> dict[str, Any]:
    """A step of rank 0, as figures; in a process of its own."""
    import torch

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime.estimate.fake_rank import fake_rank
    from autotp_plan.runtime.estimate.training_step import Batch, run_step

    with tempfile.TemporaryDirectory(prefix="autotp-scale-") as name:
        (Path(name) / "config.json").write_text(json.dumps(FAMILIES[family].config(setting)))
        plan = compile_plan(name, tp_size=setting.tp)
    batch = Batch(sequences=setting.micro_batch, length=setting.length)
    model, ranks, mode = fake_rank(plan, 0, setting.dp, torch.bfloat16)
    step = run_step(model, ranks, mode, batch, "full" if setting.checkpointing else None)
    alive = max(step.forward_peak, max(gradients + rest for gradients, rest in step.backward))
    return {
        "weights": step.parameters,
        "kept": step.kept,
        "peak": step.parameters + step.buffers + alive,
        "forward_operations": step.forward_operations,
        "backward_operations": step.backward_operations,
        "collectives": sum(one.count for one in step.collectives),
        "collective_bytes": sum(one.count * one.tensor_bytes for one in step.collectives),
        "kinds": sorted({f"{one.operation} {one.group}" for one in step.collectives}),
        "device": ranks.device.type,
    }


def measured(families: list[str]) -> list[dict[str, Any]]:
    """Every setting of every sweep, each once."""
    cells = []
    for family in families:
        wanted = dict.fromkeys(setting for settings in sweeps(BASE[family]).values() for setting in settings)
        for setting in wanted:
            started = time.perf_counter()
            (figures,) = run_ranks(measure, 1, family, setting, timeout=600)
            cells.append({"family": family, "setting": dataclasses.asdict(setting), "figures": figures})
            print(f"{time.perf_counter() - started:5.1f} s  {FAMILIES[family].name}  {setting}", flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--again", action="store_true", help="measure nothing, and write the rest from scale.json")
    options = parser.parse_args()
    if options.again:
        report = json.loads((options.output / "scale.json").read_text())
    else:
        started = time.perf_counter()
        cells = measured([*FAMILIES])
        report = {
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.perf_counter() - started),
            "versions": {
                "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "models": {key: family.name for key, family in FAMILIES.items()},
            "base": {key: dataclasses.asdict(base) for key, base in BASE.items()},
            "sweeps": {
                key: {name: [dataclasses.asdict(one) for one in tried] for name, tried in sweeps(base).items()}
                for key, base in BASE.items()
            },
            "cells": cells,
        }  # fmt: skip
    scale_report.write(report, options.output)
    print(scale_report.page(report))


if __name__ == "__main__":
    main()
