"""Whether the TP ranks of a group were given the same batches, and draw the same random numbers where they drop out."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from autotp_plan.runtime.data.random_numbers import name_random_numbers, random_states
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError

CompareBatch = Callable[[bool, tuple[Any, ...], dict[str, Any]], None]

_ON_ALL_TP_RANKS = "call the model on every rank of a TP group with the same batch"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_interval(every: int | None) -> None:
    """Raise OptionError unless `every` is a number of forwards, or None."""
    if every is not None and every < 1:
        raise OptionError(
            Fault(
                what="batches cannot be compared so often",
                where="load_model(check_batches_every=...)",
                got=str(every),
                expected="a number of forwards, 1 or more, or None to compare nothing",
                next="leave it out: every 100th forward is compared",
            )
        )


def batch_comparison(ranks: Ranks, every: int | None, drops_out: bool = False) -> CompareBatch | None:
    """What compares over the TP ranks the first batch that a model gets in training, and in evaluation, and every n-th.

    If the ranks of one group were given different samples the model would compute numbers that belong to neither. Then
    it raises MismatchError, on every rank of the group.

    Args:
        ranks: this process's place in the mesh.
        every: n, counted in training and in evaluation; None compares no batches.
        drops_out: compare the ranks' random states too, in training: at the first forward at least.

    Returns:
        A function to call at the begin of every forward with the arguments `(training, args, kwargs)`; None where there
        is nothing to compare.
    """
    if every is None and not drops_out:
        return None
    seen = {True: 0, False: 0}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compare(training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = seen[training]
        if number == 0:
            check_all_call("model.forward", _ON_ALL_TP_RANKS, ranks.tp_group)
        seen[training] += 1
        if number and (every is None or number % every):
            return
        states = random_states() if drops_out and training else {}
        if number == 0 and states:
            name_random_numbers(states, ranks, "the first forward in training")
        if every is None:
            return
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        batch = {place: value for name, given in inputs.items() for place, value in _tensors(name, given)}
        if number == 0 or _are_different({**batch, **states}, ranks):
            _name_differences(batch, ranks, number + 1, training)
            if number and states:
                name_random_numbers(states, ranks, f"{_forward(number + 1)} in training")

    compare_batch: CompareBatch = compare
    return compare_batch


def _tensors(place: Any, given: Any) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of an input: it is one, or a list of them, as images of several sizes are."""
    if isinstance(given, Tensor):
        yield place, given
    elif isinstance(given, (list, tuple)):
        for number, item in enumerate(given):
            yield from _tensors(f"{place}[{number}]", item)


def _are_different(batch: dict[Any, Tensor], ranks: Ranks) -> bool:
    """Whether a checksum of the batch is another one on some TP rank: one all-reduce, and one wait for its result."""
    checksum = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for name, value in batch.items():
        checksum = checksum * 31 + zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode())
        checksum = checksum * 31 + _checksum(value.detach()).to(ranks.device)
    bounds = torch.stack([checksum, -checksum])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=ranks.tp_group)
    largest, smallest = bounds[0], -bounds[1]
    return bool(largest != smallest)


def _checksum(tensor: Tensor) -> Tensor:
    """A number of a tensor's bits and their order, int64 on its device; sums and products wrap around."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device) * 0x9E3779B97F4A7C1  # odd: no bit is lost
    return (bits * places).sum()


def _name_differences(batch: dict[Any, Tensor], ranks: Ranks, number: int, training: bool) -> None:
    mine = {name: _summary(value) for name, value in batch.items()}
    found: list[Any] = [None] * ranks.tp_size
    dist.all_gather_object(found, mine, group=ranks.tp_group)
    faults = [
        Fault(
            what="the TP ranks of a group were given different batches",
            where=f"{name} of {_forward(number)} in {'training' if training else 'evaluation'}",
            got="; ".join(f"TP rank {rank}: {summaries.get(name, 'none')}" for rank, summaries in enumerate(found)),
            expected="the same samples on all TP ranks of a data-parallel group",
            next="plan.initialize(training_data=...), or a sampler from plan.sampler(dataset); with Hugging Face's "
            "Trainer, plan.adapt_trainer(trainer); a stream must give every rank the same order: seed its shuffle",
        )
        for name in dict.fromkeys(name for summaries in found for name in summaries)
        if len({summaries.get(name) for summaries in found}) > 1
    ]
    if faults:
        raise MismatchError(faults)


def _forward(number: int) -> str:
    return "the first forward" if number == 1 else f"forward {number}"


def _summary(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(content.tobytes()).hexdigest()[:12]
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest}"
