"""How fast weights come into the memory of a GPU: from the page cache and from the disk, beside other ways to load."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.large_model import large, reset_memory, synchronize
from benchmarks.gpu.work import Error, Found, Work, spoiled
from benchmarks.life import read_all

STATES = ("page cache", "disk")
_SAMPLES, _APART = 64, 4 * 2**20
"""Places of a file to look at; nearer ones would be read ahead by looking."""
_MOST_CACHED = 0.1
Tensors = dict[str, Tensor]


def speed(way: str, state: str, work: Work) -> Found:
    """Seconds and GB/s of a way to load the large model: all ranks' bytes, the slowest rank's time.

    What `load_model` has loaded from shards is compared, bit for bit, with what safetensors reads from them.

    Args:
        way: of `WAYS`.
        state: where the files are: in the page cache, or on the disk alone.
        work: where.
    """
    plan, checkpoint, shards = large(work)
    source = checkpoint if way in ("checkpoint", "from_pretrained") else shards
    cached: list[Any] = [None]
    if dist.get_rank() == 0:
        read_all(source, state == "disk")
        cached = [_cached(source)]
    dist.broadcast_object_list(cached)
    if state == "disk" and cached[0] > _MOST_CACHED:
        return Found(absent=f"the page cache could not be emptied: {cached[0]:.0%} of the places looked at are in it")
    reset_memory(work)
    dist.barrier()
    began = time.perf_counter()
    loaded = WAYS[way](plan, source, work)
    synchronize(work)
    seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
    size = torch.tensor([sum(value.numel() * value.element_size() for value in loaded.values())], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(size)
    figures = {"seconds": seconds.item(), "GB": size.item() / 1e9, "GB/s": size.item() / 1e9 / seconds.item()}
    if way != "shards":
        return Found(figures=figures)
    read = _safetensors(plan, shards, work)
    wrong = spoiled(loaded, min(loaded))
    return Error(worst=_different(loaded, read), planted=_different(wrong, read)).found(**figures)


def _load_model(plan: Any, source: Path, work: Work) -> Tensors:
    """Ours; on a CPU without a map of the file, which would read nothing yet."""
    from autotp_plan.runtime.loading.local_shard import local_shard

    model = plan.load_model(source, map_shards=work.device == "cuda")
    shards = {entry.name: local_shard(model, entry.name) for entry in plan.document.expanded()}
    return {name: shard.detach() for name, shard in shards.items() if shard is not None}


def _from_pretrained(plan: Any, source: Path, work: Work) -> Tensors:
    """transformers' own way, of one process: every process takes the whole model."""
    from transformers import AutoModelForCausalLM

    if dist.get_rank():
        return {}
    device = 0 if work.device == "cuda" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map={"": device})
    return {name: value.detach() for name, value in model.named_parameters()}


def _safetensors(plan: Any, source: Path, work: Work) -> Tensors:
    """safetensors alone: the rank's files, and those that all ranks share."""
    from safetensors.torch import load_file

    found: Tensors = {}
    for kind in (f"tp-{dist.get_rank():02}-*.safetensors", "shared.*.safetensors"):
        for path in sorted(source.glob(kind)):
            found.update(load_file(path, device="cuda:0" if work.device == "cuda" else "cpu"))
    return found


WAYS: dict[str, Callable[[Any, Path, Work], Tensors]] = {
    "shards": _load_model,
    "checkpoint": _load_model,
    "from_pretrained": _from_pretrained,
    "safetensors": _safetensors,
}


def _different(found: Tensors, expected: Tensors) -> float:
    """How many tensors differ, or are missing, or too many."""
    both = found.keys() & expected.keys()
    return float(
        len(found.keys() ^ expected.keys()) + sum(not torch.equal(found[name], expected[name]) for name in both)
    )


def _cached(folder: Path) -> float:
    """The share of places in the weights of a folder that the page cache has."""
    buffer = bytearray(1)
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            size = path.stat().st_size
            for place in range(0, size, max(_APART, size // _SAMPLES)):
                try:
                    os.preadv(file.fileno(), [buffer], place, os.RWF_NOWAIT)
                    found.append(True)
                except BlockingIOError:
                    found.append(False)
                except OSError:  # the file system cannot say: then it was not emptied either
                    found.append(True)
    return sum(found) / len(found)
