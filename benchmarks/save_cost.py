"""python -m benchmarks.save_cost [--megabytes 600] [--rounds 7] [--folder DIR]

What durable, checksummed checkpoints of a job cost: the same engine on two ranks is saved by turns by DeepSpeed alone
with a sync of what it wrote, and by `plan.save_checkpoint`; and it is loaded by turns with and without comparing
checksums. Files of about so many megabytes in all; medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = 1.1
"""A save takes at most so many times the time of DeepSpeed's and a sync."""

_HIDDEN = 512


def _config(megabytes: int) -> dict[str, Any]:
    layer = 12 * _HIDDEN**2  # of weights, about; each is saved as a weight and three times by the optimizer
    layers = max(1, round(megabytes * 1e6 / 16 / layer))
    return {
        "hidden_size": _HIDDEN, "num_hidden_layers": layers, "intermediate_size": 8 * _HIDDEN // 3 // 16 * 16,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024,
    }  # fmt: skip


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, list[float]]:
    """Inside a rank: the seconds that each round took, by what was done."""
    import torch
    import torch.distributed as dist

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity

    if dist.get_rank() == 0:
        _write_model(folder, megabytes)
    dist.barrier()
    plan = load_plan(folder / "plan.json")
    engine, *_ = plan.initialize(
        plan.load_model(folder / "model", check_batches_every=None).train(), config=parity.engine_settings(1)
    )
    ids = torch.randint(0, 1000, (1, 8), generator=torch.Generator().manual_seed(1))
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()
    resume: Any = importlib.import_module("autotp_plan.runtime.checkpoint.resume")
    compare = resume.file_faults

    def load(checked: bool) -> None:
        resume.file_faults = compare if checked else lambda *arguments: ()
        plan.load_checkpoint(engine, folder / "kept")

    plan.save_checkpoint(engine, folder / "kept")
    kinds: dict[str, Callable[[Path], Any]] = {
        "DeepSpeed and a sync": lambda path: _plain(engine, path),
        "plan.save_checkpoint": lambda path: plan.save_checkpoint(engine, path),
        "load without checksums": lambda path: load(False),
        "load": lambda path: load(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name in list(kinds) if number % 2 else [*list(kinds)[1::-1], *list(kinds)[:1:-1]]:
            path = folder / f"job-{name.replace(' ', '-')}"
            dist.barrier()
            start = time.perf_counter()
            kinds[name](path)
            dist.barrier()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
    seconds["bytes"] = [float(sum(path.stat().st_size for path in (folder / "kept").rglob("*") if path.is_file()))]
    return seconds


def _plain(engine: Any, path: Path) -> None:
    """What DeepSpeed saves, and every file of this rank and the folder synced."""
    import torch.distributed as dist

    engine.save_checkpoint(str(path), tag="tag")
    rank = f"mp_rank_{dist.get_rank():02d}"
    for found in [*path.glob(f"tag/*{rank}*"), path / "tag", path]:
        descriptor = os.open(found, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write_model(folder: Path, megabytes: int) -> None:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    save_checkpoint(folder / "model", "llama", **_config(megabytes))
    (folder / "plan.json").write_text(compile_plan(folder / "model", tp_size=2).to_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=None, help="on the disk to measure; the temporary folder when left out")
    options = parser.parse_args()
    from tests.helpers.launch import launch

    with tempfile.TemporaryDirectory(prefix="autotp-save-cost-", dir=options.folder) as name:
        ranks = launch(measure, 2, Path(name), options.megabytes, options.rounds, timeout=1200)
    size = ranks[0].pop("bytes")[0]
    medians = {}
    print(
        f"{size / 1e6:.0f} MB in all, {options.rounds} rounds, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    )
    for kind in ranks[0]:
        of_all = [max(rank[kind][number] for rank in ranks) for number in range(options.rounds)]
        medians[kind] = statistics.median(of_all)
        print(f"{kind:24} median {medians[kind]:6.2f} s   {' '.join(f'{one:.2f}' for one in of_all)}")
    save = medians["plan.save_checkpoint"] / medians["DeepSpeed and a sync"]
    verdict = "met" if save <= TARGET else "MISSED"
    print(f"a save: {save:.2f} of DeepSpeed's and a sync; target: at most {TARGET}: {verdict}")
    print(f"a load: {medians['load'] / medians['load without checksums']:.2f} of one that compares no checksums")
    sys.exit(save > TARGET)


if __name__ == "__main__":
    main()
