"""python -m benchmarks.load_memory [--layers 16]

Host memory of a rank while it loads its part of a model, from a shards folder and from the original checkpoint, beside
`from_pretrained` of the whole model in one process. Two real ranks over gloo; a thread of each reads RssAnon. The
baseline is taken after process groups and imports: transformers imports a model's code when it is first asked for.
What maps its files (shards, `from_pretrained`) takes memory when a weight is first written to, as by an optimizer: so
each is.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.storage.safetensors_header import num_bytes, read_header
from tests.helpers.launch import launch
from tests.helpers.sparse import llama_tensors, write_sparse_checkpoint

TP_SIZE = 2
TARGET_MIB = 64
MIB = 2**20
PLANS = Path(__file__).parent.parent / "autotp_plan" / "plans"


class Sampler:
    """The largest RssAnon of this process, in bytes, while the block runs. `baseline` is what it was at the start."""

    def __enter__(self) -> Sampler:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.baseline = self.peak = 0
        self._thread.start()
        while not self.baseline:
            self._stop.wait(0.01)  # with the thread's own memory in it
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._status)

    def _sample(self) -> None:
        while not self._stop.wait(0.0005):
            status = os.pread(self._status, 4096, 0)
            at = status.index(b"RssAnon:") + len(b"RssAnon:")
            self.peak = max(self.peak, int(status[at : status.index(b"kB", at)]) * 1024)
            self.baseline = self.baseline or self.peak


def load_planned(plan_file: Path, folder: Path) -> tuple[int, int, int, int]:
    """Inside a rank: RssAnon before, its peak while loading and until all was written to; the bytes loaded."""
    from autotp_plan.runtime import load_plan

    import_model_code()
    plan = load_plan(plan_file)
    assert plan.init_mesh().tp_size == TP_SIZE  # the groups are made here
    with Sampler() as sampler:
        model = plan.load_model(folder)
        loaded = sampler.peak
        write_to(model)
    return sampler.baseline, loaded, sampler.peak, held_bytes(model)


def load_whole(folder: Path) -> tuple[int, int, int, int]:
    """As `load_planned`, for the whole model in one process, as transformers loads it."""
    import transformers

    import_model_code()
    transformers.logging.disable_progress_bar()
    with Sampler() as sampler:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        loaded = sampler.peak
        write_to(model)
    return sampler.baseline, loaded, sampler.peak, held_bytes(model)


def write_to(model: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def import_model_code() -> None:
    """Import all that loading imports, so that it does not count as memory of the model."""
    import deepspeed  # noqa: F401
    import transformers

    transformers.AutoConfig.for_model("llama")
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        getattr(transformers, name)


def held_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """A Llama of 12 million parameters a layer and 66 million of vocabulary, in bf16; the bytes are random."""
    config = json.loads((PLANS / "llama_3_1_8b/config.json").read_text())
    config.update(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=32000)
    config.update(num_hidden_layers=num_layers, bos_token_id=1, eos_token_id=2)
    write_sparse_checkpoint(folder, config, llama_tensors(config), num_files=2)
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:
            for tensor in read_header(path).tensors:
                file.seek(tensor.start)
                file.write(os.urandom(tensor.stop - tensor.start))


def shard_bytes(plan: Plan, rank: int) -> int:
    return sum(num_bytes(entry.dtype, plan.layouts[entry.layout].rank_shape(rank)) for entry in plan.expanded())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    num_layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        checkpoint, shards, plan_file = (Path(name) / part for part in ("checkpoint", "shards", "plan.json"))
        checkpoint.mkdir()
        write_checkpoint(checkpoint, num_layers)
        plan = compile_plan(checkpoint, tp_size=TP_SIZE)
        plan_file.write_text(plan.to_json())
        presplit(plan, checkpoint, shards)
        rows = [
            *_rows("shards folder", launch(load_planned, TP_SIZE, plan_file, shards)),
            *_rows("original checkpoint", launch(load_planned, TP_SIZE, plan_file, checkpoint)),
        ]
        whole = _rows("from_pretrained", launch(load_whole, 1, checkpoint))
    for (label, *_, held), rank in zip(rows, [*range(TP_SIZE)] * 2):
        assert held == shard_bytes(plan, rank), f"{label} loaded {held} bytes"
    print(f"{'MiB':28}{'baseline':>10}{'loading':>9}{'written to':>12}{'weights':>9}{'difference':>12}")
    for label, baseline, loaded, peak, held in [*rows, *whole]:
        used = peak - baseline
        print(f"{label:28}{baseline / MIB:10.1f}{(loaded - baseline) / MIB:9.1f}{used / MIB:12.1f}{held / MIB:9.1f}"
              f"{(used - held) / MIB:12.1f}")  # fmt: skip
    largest = max(peak - baseline - held for _, baseline, _, peak, held in rows) / MIB
    met = "met" if largest <= TARGET_MIB else "MISSED"
    print(f"target: a rank's own weights and at most {TARGET_MIB} MiB: {largest:.1f} MiB, {met}")


def _rows(label: str, results: list[tuple[int, int, int, int]]) -> list[tuple[str, int, int, int, int]]:
    if len(results) == 1:
        return [(label, *results[0])]
    return [(f"{label}, rank {rank}", *result) for rank, result in enumerate(results)]


if __name__ == "__main__":
    main()
