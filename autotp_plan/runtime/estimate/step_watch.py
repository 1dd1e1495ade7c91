"""What is seen while a rank trains: its memory by what it is for, its collectives and operations."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.deepspeed.zero_internals import flat_groups, partition_of
from autotp_plan.runtime.estimate.fake_internals import Watch, count_operations, maker_of
from autotp_plan.schemas.estimate.document import Part, RankEstimate, Traffic
from autotp_plan.schemas.estimate.settings import Settings

_OPERATIONS = {
    "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter", "broadcast_": "broadcast",
    "alltoall_": "all-to-all", "alltoall_base_": "all-to-all", "reduce_": "reduce", "barrier": "barrier",
}  # fmt: skip
_ON_HOST = ("master weights", "optimizer states")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Peak:
    """The most that was held in a phase."""

    bytes: int
    when: str
    parts: dict[str, int]


class Seen:
    """What is seen while a rank trains: its memory by what it is for, collectives and operations of its last step."""

    def __init__(self, model: nn.Module, ranks: Ranks, gradients: str) -> None:
        """Watch a model that is about to be trained.

        Args:
            model: in training mode.
            ranks: this process's place in the mesh.
            gradients: what gradients are called in the answer.
        """
        self.steps, self.times = -1, 1
        """The step that is seen, of which the second one counts; and how often what is seen happens in a step."""
        self._gradients, self._ranks, self._phase, self._at, self._when = gradients, ranks, "initialize", "", ""
        self._tensor, self._data = (set(_members(group)) for group in (ranks.tp_group, ranks.dp_group))
        self._collectives: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._operations: Counter[str] = Counter()
        self._peaks: dict[tuple[int, str], _Peak] = {}
        self.watch = Watch(self._see, name=self._name)
        self.watch.at_new_peak = self._note
        self.watch.rename(model.parameters(), "weights")
        self.watch.rename(model.buffers(), "buffers")
        self._model = model
        self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        """Follow the model's progress, and name gradients when they are made."""
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        layers = max(lists, key=len, default=nn.ModuleList())
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._sets(f"layer {number + 1} of {len(layers)}"))
        inner = getattr(model, "base_model", model)  # a head that computes its loss in chunks takes no hooks
        inner.register_forward_hook(self._sets("head and loss"))
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        for name, parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._gradient(name))  # type: ignore[no-untyped-call]

    def _sets(self, where: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._phase == "forward":
                self._at = where

        return hook

    def _gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._at = f"after the gradient of {name}"
            if parameter.grad is not None:
                self.watch.rename([parameter.grad], self._gradients)
            gc.collect(0)

        return hook

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While active, a part of a step is done."""
        self._end()
        self._phase, self._at = name, ""
        if self.steps == 1:
            with count_operations() as flops:
                yield
            self._operations[name] += self.times * int(flops.get_total_flops())
        else:
            yield
        self._end()

    def _end(self) -> None:
        """Note the peak of the phase that ends."""
        peak = _Peak(
            bytes=self.watch.peak,
            when=f"{self._phase}, {self._when}" if self._when else self._phase,
            parts={what: size for what, size in self.watch.peak_parts.items() if size},
        )
        key = (self.steps, self._phase)
        if key not in self._peaks or peak.bytes > self._peaks[key].bytes:
            self._peaks[key] = peak
        self.watch.restart_peak()
        self._when = self._at = ""

    def made(self, engine: Any) -> None:
        """The engine is there: what of its memory holds the weights, and the master weights."""
        self._end()
        held = [one for group in engine.basic_optimizer.param_groups for one in group["params"]]
        if engine.zero_optimization_stage() > 0:
            held = flat_groups(engine.optimizer)
        self.watch.rename(held, "master weights")
        self._rename_weights()
        self._collectives.clear()
        self._bytes.clear()

    def _rename_weights(self) -> None:
        for parameter in self._model.parameters():
            held = partition_of(parameter, self._ranks.dp_rank)
            self.watch.rename([parameter.data if held is None else held[1]], "weights")

    def stepped(self, engine: Any) -> None:
        """A step is over: what of its memory holds the optimizer's states."""
        states = engine.basic_optimizer.state.values()
        tensors = (one for state in states for one in state.values() if isinstance(one, Tensor))
        self.watch.rename(tensors, "optimizer states")
        self._rename_weights()
        self.watch.restart_peak()

    def _note(self) -> None:
        self._when = self._at

    def _name(self) -> str:
        """What a new tensor is for, by the code that makes it."""
        maker = maker_of(inspect.currentframe())
        if self._phase == "initialize":
            return "optimizer states" if maker == "optimizer" else "buffers of ZeRO"
        if maker == "gathering":
            return "gathered weights"
        if self._phase == "forward":
            return "logits and loss" if self._at == "head and loss" else "activations"
        if self._phase == "backward":
            return {"engine": self._gradients, "model": "activations computed again"}.get(maker, "temporary")
        return "optimizer states" if maker == "optimizer" and self.steps == 0 else "temporary"

    def _see(self, operation: str, group: Any, size: int) -> None:
        if self.steps != 1:
            return
        members = set(_members(group))
        over = "tensor" if members == self._tensor else "data" if members == self._data else "all"
        key = (_OPERATIONS.get(operation, operation.strip("_")), over)
        if len(members) > 1:
            self._collectives[key] += self.times
            self._bytes[key] += self.times * size

    def estimate(self, ranks: Ranks, settings: Settings) -> RankEstimate:
        """What was seen."""
        peaks = {key: _on_device(peak, settings) for key, peak in self._peaks.items()}
        highest = max(peaks.values(), key=lambda peak: peak.bytes)
        phases: dict[str, int] = {}
        for (_, name), peak in sorted(peaks.items(), key=lambda item: item[0][0]):
            phases[name] = max(peak.bytes, phases.get(name, 0))
        last = self._peaks[(1, "optimizer step")].parts
        host = [Part(what=what, bytes=last[what]) for what in _ON_HOST if what in last]
        return RankEstimate(
            tp_ranks=(ranks.tp_rank,),
            peak=highest.bytes,
            when=highest.when,
            at_peak=tuple(Part(what=what, bytes=size) for what, size in sorted(highest.parts.items(), key=_by_size)),
            phases=tuple(Part(what=what, bytes=size) for what, size in phases.items()),
            host=tuple(host) if settings.offload == "optimizer" else (),
            traffic=tuple(
                Traffic(operation=operation, group=group, count=count, bytes=self._bytes[operation, group])
                for (operation, group), count in sorted(self._collectives.items())
            ),
            forward_operations=self._operations["forward"],
            backward_operations=self._operations["backward"],
        )


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def _on_device(peak: _Peak, settings: Settings) -> _Peak:
    """A peak without what is offloaded."""
    if settings.offload == "none":
        return peak
    parts = {what: size for what, size in peak.parts.items() if what not in _ON_HOST}
    return _Peak(bytes=sum(parts.values()), when=peak.when, parts=parts)


def _members(group: Any) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)
