"""The full tensors of a sharded model, one at a time on the first rank.

Each rank sends what it holds (its shard, under ZeRO 3 its part of the shard), a bounded number of bytes at a time, to
the memory of the first rank's host. No rank holds more of the model than one tensor; nothing is gathered on devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.agreement import gathered
from autotp_plan.runtime.deepspeed.attendance import check_all_call
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import full_shape, partition_of
from autotp_plan.runtime.loading.local_shard import shards_of
from autotp_plan.runtime.parameters.partly_replicated import held_parameters, join_held
from autotp_plan.runtime.parameters.state_dicts import shards_in_state_dict
from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout

GATHERED_BYTES = 64 * 1024 * 1024
"""Bytes that all ranks together send to the first one at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullTensor:
    """A tensor of the model without sharding.

    Attributes:
        name: its name in the state dict of the model that is not sharded.
        shape: its full shape.
        dtype: the dtype that the model holds it in.
        tied_to: the name of the tensor that it is the same as, None where it is the first of its name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tied_to: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """A tensor as this rank holds it: in one tensor or in two, partitioned by ZeRO 3 or not."""

    leaf: str
    layout: Layout
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]


class FullTensors:
    """The state dict of the model without sharding, tensor by tensor. Every rank makes one, and calls its methods.

    Args:
        model: a sharded model, or anything that wraps one.
        ranks: this process's place in the mesh.
        call: what needs them, for the error when a rank does not call it.
        only_trained: leave out parameters that are frozen, and buffers.

    Raises:
        MismatchError: not every rank makes the call.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, *, call: str, only_trained: bool = False) -> None:
        check_all_call(call)
        self.ranks = ranks
        self._held: dict[str, _Held] = {}
        self.tensors: dict[str, FullTensor] = {}
        """Every tensor by name, in the order of the state dict."""
        self._parts: dict[str, list[tuple[int, Tensor] | None]] = {}
        self._everyone = gathered(lambda: self._find(model, only_trained), f"{call} could not begin")

    def _find(self, model: nn.Module, only_trained: bool) -> tuple[int, int, dict[str, list[int]]]:
        """Note what this rank holds; returns its TP rank, DP rank and how much it holds under ZeRO 3, by name."""
        first: dict[tuple[int, ...], str] = {}
        for name, held in _held_tensors(model):
            if only_trained and not any(tensor.requires_grad for tensor in held.tensors):
                continue
            tied_to = first.setdefault(tuple(map(id, held.tensors)), name)
            self._held[name] = held
            self.tensors[name] = FullTensor(
                name=name,
                shape=held.shape,
                dtype=held.tensors[0].dtype,
                tied_to=None if tied_to == name else tied_to,
            )
        dp_rank = self.ranks.dp_rank
        self._parts.update(
            (name, [partition_of(one, dp_rank) if isinstance(one, nn.Parameter) else None for one in held.tensors])
            for name, held in self._held.items()
        )
        sizes = {name: [part[1].numel() for part in parts if part is not None] for name, parts in self._parts.items()}
        return self.ranks.tp_rank, dp_rank, sizes

    def gather(self, name: str) -> Tensor | None:
        """The full tensor `name`: on the first rank, in the memory of its host. None on the others."""
        held = self._held[name]
        flat = {
            rank: torch.split(data.view(held.tensors[0].dtype), sizes)
            for rank, (data, sizes) in self._gather_bytes(name, held).items()
        }
        if torch.distributed.get_rank() > 0:
            return None
        full = torch.empty(held.shape, dtype=held.tensors[0].dtype)
        size = held.layout.shape[held.layout.dim] if held.layout.dim is not None else 0
        for tp_rank in range(self.ranks.tp_size if held.layout.dim is not None else 1):
            senders = sorted((self._everyone[rank][1], rank) for rank in flat if self._everyone[rank][0] == tp_rank)
            ours = held_parameters(held.leaf, held.layout, held.shape, tp_rank)
            tensors = [torch.cat([flat[rank][place] for _, rank in senders]) for place in range(len(held.tensors))]
            shard = join_held(ours, tensors, held.layout, held.shape, tp_rank).view(held.layout.rank_shape(tp_rank))
            if held.layout.dim is None:
                return shard.view(held.shape)
            along = full.view(held.layout.shape)
            for at, to, count in iv.copies(held.layout.intervals[tp_rank], ((0, size),)):
                source = shard.narrow(held.layout.dim, at, count)
                along.narrow(held.layout.dim, to, count).copy_(source)
        return full

    def _gather_bytes(self, name: str, held: _Held) -> dict[int, tuple[Tensor, list[int]]]:
        """On the first rank, by sending rank: the bytes of what it holds, and the elements of each tensor of it."""
        partitioned = all(part is not None for part in self._parts[name])
        sharded = held.layout.dim is not None
        ranks, group = self.ranks, None
        senders = [
            rank
            for rank, (tp_rank, dp_rank, _) in enumerate(self._everyone)
            if (sharded or tp_rank == 0) and (partitioned or dp_rank == 0)
        ]
        me = torch.distributed.get_rank()
        if me not in senders:
            return {}
        if len(senders) < len(self._everyone):
            group = ranks.tp_group if sharded else ranks.dp_group
        if partitioned:
            pieces = [part[1].reshape(-1) for part in self._parts[name] if part is not None]
            elements = {rank: list(self._everyone[rank][2][name]) for rank in senders}
        else:
            pieces = [tensor.detach().reshape(-1) for tensor in held.tensors]
            elements = {rank: self._elements(held, self._everyone[rank][0]) for rank in senders}
        itemsize = held.tensors[0].dtype.itemsize
        sizes = {rank: sum(counts) * itemsize for rank, counts in elements.items()}
        local = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        received = _gather(local.contiguous().view(torch.uint8), sizes, group, ranks.device)
        return {rank: (data, elements[rank]) for rank, data in received.items()}

    def _elements(self, held: _Held, tp_rank: int) -> list[int]:
        ours = held_parameters(held.leaf, held.layout, held.shape, tp_rank)
        return [torch.Size(one.layout.rank_shape(tp_rank)).numel() for one in ours]


def full_state_dict(
    model: nn.Module, ranks: Ranks, *, call: str, only_trained: bool = False
) -> dict[str, Tensor] | None:
    """The state dict of the model without sharding, in the memory of the first rank's host; every rank calls it.

    Args:
        model: a sharded model, or anything that wraps one.
        ranks: this process's place in the mesh.
        call: what needs it, for the error when a rank does not call it.
        only_trained: leave out parameters that are frozen, and buffers.

    Returns:
        On the first rank the tensors by name, tied ones as one tensor; None on the others.
    """
    full = FullTensors(model, ranks, call=call, only_trained=only_trained)
    state: dict[str, Any] = {}
    for name, tensor in full.tensors.items():
        state[name] = state[tensor.tied_to] if tensor.tied_to is not None else full.gather(name)
    return state if torch.distributed.get_rank() == 0 else None


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the state dict of the model without sharding, by name. No communication."""
    return {name: held.shape for name, held in _held_tensors(model)}


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, _Held]]:
    """What this rank holds of each entry of the full state dict."""
    with shards_in_state_dict():
        state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        prefix, _, leaf = name.rpartition(".")
        shards = shards_of(model.get_submodule(prefix))
        if shards is None or all(leaf != one.name for held in shards.held.values() for one in held):
            shape = full_shape(tensor)
            yield name, _Held(leaf=leaf, layout=Layout(shape=shape), shape=shape, tensors=(tensor,))
        elif leaf in shards.held:
            before = name.removesuffix(leaf)
            yield (
                name,
                _Held(
                    leaf=leaf,
                    layout=shards.layouts[leaf],
                    shape=shards.shapes[leaf],
                    tensors=tuple(state[before + one.name] for one in shards.held[leaf]),
                ),
            )


def _gather(local: Tensor, sizes: dict[int, int], group: Any, device: torch.device) -> dict[int, Tensor]:
    """On the first rank the bytes of each rank of `group`, on the CPU, by its number in the world."""
    me, first = torch.distributed.get_rank(), 0
    if len(sizes) == 1:
        return {me: local.cpu()}
    received = {rank: torch.empty(size, dtype=torch.uint8) for rank, size in sizes.items()} if me == first else {}
    chunk = max(1, min(GATHERED_BYTES // len(sizes), max(sizes.values())))
    for start in range(0, max(sizes.values()), chunk):
        sent = torch.zeros(chunk, dtype=torch.uint8, device=device)
        part = local[start : start + chunk]
        sent[: part.numel()] = part
        parts = [torch.empty_like(sent) for _ in sizes] if me == first else None
        torch.distributed.gather(sent, parts, dst=first, group=group)
        for (rank, size), got in zip(sizes.items(), parts or ()):
            received[rank][start : start + chunk] = got[: max(0, min(chunk, size - start))].cpu()
    return received
