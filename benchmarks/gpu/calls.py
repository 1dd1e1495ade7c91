"""Calls on a sharded model on a GPU: saving, generating, waiting for the card, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.work import Error, Found, Work, absolute, batches, checkpoint, dense, sharded

_KEPT: list[BaseException] = []


def saving(work: Work) -> Found:
    """`save_pretrained` of a sharded model on the card: bit for bit the checkpoint it came from."""
    from safetensors.torch import load_file

    _, model = sharded(work, "phi3")
    folder = work.folder / "saved"
    model.save_pretrained(folder)
    dist.barrier()
    source: dict[str, torch.Tensor] = {}
    saved: dict[str, torch.Tensor] = {}
    for place, tensors in ((checkpoint(work, "phi3"), source), (folder, saved)):
        for path in sorted(place.glob("*.safetensors")):
            tensors.update(load_file(path))
    return absolute(saved, source).found(tensors=len(source))


def generation(work: Work) -> Found:
    """Greedy tokens are the unsharded model's; sampled ones are the same on both ranks."""
    tokens = batches(work)(3)[:, :6]
    _, model = sharded(work, "llama")
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.eval().generate(tokens, do_sample=False, **options)
    expected = dense(work, "llama").eval().generate(tokens, do_sample=False, **options)
    torch.manual_seed(dist.get_rank())
    sampled = model.generate(tokens, do_sample=True, **options)
    both: list[Any] = [None, None]
    dist.all_gather_object(both, sampled.tolist())
    assert both[0] == both[1], "the ranks sampled different tokens"
    wrong = greedy.clone()
    wrong[0, -1] += 1
    error = Error(worst=float((greedy != expected).sum()), planted=float((wrong != expected).sum()))
    return error.found(tokens=greedy.numel())


def synchronizing_calls(work: Work) -> Found:
    """How often a forward and backward pass waits for the card, sharded and not: the error is the difference."""
    counts = []
    tokens = batches(work)(0)
    _, model = sharded(work, "llama")
    for one in (dense(work, "llama"), model):
        one(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        counts.append([f"{Path(one.filename).name}:{one.lineno}" for one in caught])
    more = len(counts[1]) - len(counts[0])
    where = " ".join(sorted(set(counts[1])))
    return Error(worst=float(more), planted=more + 1.0).found(
        unsharded=len(counts[0]), sharded=len(counts[1]), where=where
    )


def unknown_token(work: Work) -> Found:
    """An id outside of the vocabulary ends in an error, as it does without sharding. The card is of no use after it."""
    tokens = batches(work)(0)
    _, model = sharded(work, "llama", check_batches_every=None)
    tokens[0, 0] = 256
    try:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    except (RuntimeError, IndexError) as error:
        _KEPT.append(error)  # with its frames: to free a tensor on that card would end the process
        return Found(figures={"says": str(error).splitlines()[0]})
    raise AssertionError("a loss was computed")


def too_few_devices(work: Work) -> Found:
    """A rank without a card of its own is told so."""
    import os

    from autotp_plan.runtime.deepspeed.mesh import init_ranks
    from autotp_plan.schemas.errors import MismatchError

    os.environ["LOCAL_RANK"] = str(torch.cuda.device_count())
    try:
        init_ranks(dist.get_world_size())
    except MismatchError as error:
        return Found(figures={"says": str(error).splitlines()[0]})
    finally:
        os.environ["LOCAL_RANK"] = "0"
    raise AssertionError("nothing was said")
