"""NaN or inf in a loss, a gradient or a weight: found without waiting for the device, and said with names.

DeepSpeed has computed the norm of the gradients in a step, and has looked at it, under ZeRO and in bf16: a step that is
not finite is found at once. In float32 without ZeRO it computes none. Then each loss is looked at on the device, and
every tenth step the ranks compare what they have seen. With fp16 the loss scaler decides: it skips steps on purpose,
but not very many in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from deepspeed.utils import logger
from torch import Tensor, nn

from autotp_plan.runtime.deepspeed.agreement import are_several, gathered
from autotp_plan.runtime.deepspeed.zero_internals import partition_of
from autotp_plan.runtime.optimizers.held_gradients import before_gradients_go, held_gradients, parameter_groups
from autotp_plan.schemas.errors import Fault, NonFiniteError
from autotp_plan.schemas.names import some

EVERY = 10
"""Steps between two comparisons of the losses that the ranks have seen."""
MOST_SKIPPED = 100
"""Steps in a row that fp16's loss scaling skips before training stops; to get from 2**32 to 1 it needs 33."""

_NEVER = 2**62
_SHOWN, _SENT = 5, 100
_OF_GROUPS = ("lr", "weight_decay")
"""Settings of a parameter group that are said with it."""
_NEXT = (
    "resume from the latest checkpoint with a lower learning rate, a gradient_clipping, or without the data of that "
    "step; to train on regardless, initialize(..., check_finite=False), --allow-nonfinite of the training program"
)


class FiniteCheck:
    """Watches one engine. Every rank makes the same calls.

    Args:
        engine: a DeepSpeed engine.
        dp_rank: this process's rank in its data-parallel group.
        stops: whether training stops; it is only said otherwise, when the weights are saved.
    """

    def __init__(self, engine: Any, dp_rank: int, stops: bool = True) -> None:
        self._engine, self._dp_rank, self.stops = engine, dp_rank, stops
        self._scaled = bool(engine.fp16_enabled())
        self._first = torch.full((), _NEVER, dtype=torch.int64, device=engine.device)
        self._skipped = 0
        self._gradients: list[str] | None = None
        self._settings: list[dict[str, Any]] = []

    @torch.no_grad()
    def see(self, value: Any) -> None:
        """Look at a loss or norm on its device, and remember the first step at which one was not finite."""
        if self.stops and not self._scaled and isinstance(value, Tensor):
            step = self._engine.global_steps + 1
            seen = torch.where(torch.isfinite(value.detach()).all(), _NEVER, step).to(self._first.device)
            self._first = torch.minimum(self._first, seen)

    @contextmanager
    def during_step(self) -> Iterator[None]:
        """While active, the engine steps; what it found is looked at in the end.

        Raises:
            NonFiniteError: gradients were not finite. The same on every rank.
        """
        engine, before = self._engine, self._engine.global_steps
        if not self.stops or (self._scaled and self._skipped < MOST_SKIPPED - 1):
            yield
            if engine.global_steps > before:
                self._skipped = self._skipped + 1 if getattr(engine.optimizer, "overflow", False) else 0
            return
        self._gradients = None
        # before a scheduler changes them
        self._settings = [{name: group[name] for name in _OF_GROUPS if name in group} for group in _groups(engine)]

        def look() -> None:
            if self._gradients is None and getattr(engine.optimizer, "overflow", False):
                names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
                held = held_gradients(engine)
                self._gradients = _not_finite((names.get(id(one), "a parameter"), part) for one, part in held)

        with before_gradients_go(engine.optimizer, look):
            yield
        if engine.global_steps > before:
            self._after_step()

    def _after_step(self) -> None:
        engine = self._engine
        norm = engine.get_global_grad_norm()
        on_device = isinstance(norm, Tensor) and norm.device.type != "cpu"
        skipped = bool(getattr(engine.optimizer, "overflow", False))
        if self._scaled and not skipped:
            self._skipped = 0
            return
        if skipped or (norm is not None and not on_device and not math.isfinite(norm)):
            self._stop(f"step {engine.global_steps}", self._gradients, skipped)
        if on_device:
            self._first = torch.minimum(self._first, torch.where(torch.isfinite(norm), _NEVER, engine.global_steps))
        if engine.global_steps % EVERY == 0:
            self.compare()

    def compare(self) -> None:
        """Compare over all ranks what they have seen until now. Every rank calls it.

        Raises:
            NonFiniteError: a loss or norm was not finite. The same on every rank.
        """
        if not self.stops or self._scaled:
            return
        if are_several():
            torch.distributed.all_reduce(self._first, op=torch.distributed.ReduceOp.MIN)
        first = int(self._first)
        if first < _NEVER:
            self._stop(f"step {first}, found after step {self._engine.global_steps}", None, False)

    def before_save(self) -> None:
        """Look at all weights before they are saved. Every rank calls it.

        Raises:
            NonFiniteError: a loss, norm or weight is not finite, and training is to stop at that. Else it is said.
        """
        step = self._engine.global_steps
        self.compare()
        found = _of_all(self._weights())
        if found and self.stops:
            raise NonFiniteError(_fault(f"step {step}: the weights, which are not saved", _listed("weights", found)))
        if found and (not are_several() or torch.distributed.get_rank() == 0):
            logger.warning(f"the checkpoint of step {step} holds NaN or inf: {_listed('weights', found)}")

    def _stop(self, where: str, gradients: list[str] | None, skipped: bool) -> None:
        names = _of_all(gradients or [])
        got = "a loss or a gradient norm that is not finite"
        if names:
            got = f"{_listed('gradients', names)}{self._in_groups(names)}"
        elif weights := _of_all(self._weights()):
            got += f"; {_listed('weights', weights)}{self._in_groups(weights)}"
        if skipped:
            before = "the step before" if not self._scaled else f"{self._skipped + 1} steps before, skipped since"
            got += f"; the weights are those of {before}"
        raise NonFiniteError(_fault(where, got))

    def _in_groups(self, names: Iterable[str]) -> str:
        """The optimizer's parameter groups that parameters are in, with the settings of the step that stopped."""
        modules = dict(self._engine.module.named_parameters())
        wanted = {id(modules[name]) for name in names if name in modules}
        found = sorted(
            {number for number, group in parameter_groups(self._engine.optimizer) if wanted & set(map(id, group))}
        )
        if not found or found[-1] >= len(self._settings):
            return ""
        said = [f"{number} ({_said(self._settings[number])})" for number in found]
        return f", in the optimizer's parameter group{'s' if len(said) > 1 else ''} {some(said, _SHOWN)}"

    def _weights(self) -> list[str]:
        """The parameters of which this rank holds an element that is NaN or inf."""
        return _not_finite((name, self._held(one)) for name, one in self._engine.module.named_parameters())

    def _held(self, parameter: nn.Parameter) -> Tensor:
        partition = partition_of(parameter, self._dp_rank)
        return parameter.detach() if partition is None else partition[1]


@torch.no_grad()
def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or inf."""
    found = [
        (name, torch.stack(torch.aminmax(tensor)).isfinite().all())
        for name, tensor in tensors
        if tensor.numel() and tensor.is_floating_point() and tensor.element_size() > 1
    ]
    if not found:
        return []
    finite = torch.stack([one.to(found[0][1].device) for _, one in found]).tolist()
    bad = [name for (name, _), is_finite in zip(found, finite, strict=True) if not is_finite]
    return list(dict.fromkeys(bad))[:_SENT]


def count_nonfinite(tensor: Tensor) -> int:
    """How many elements of a tensor are NaN or inf."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


def warn_of_nonfinite(counts: Mapping[str, int], folder: Any) -> None:
    """Say which tensors were saved with NaN or inf, by the number of such elements; on the first rank."""
    found = {name: count for name, count in counts.items() if count}
    if found and (not are_several() or torch.distributed.get_rank() == 0):
        shown = some([f"{name} ({count} elements)" for name, count in found.items()], _SHOWN)
        logger.warning(
            f"{folder} holds NaN or inf, in the model or because a weight is larger than the dtype of the file can "
            f"say: {shown}"
        )


def _groups(engine: Any) -> list[dict[str, Any]]:
    return getattr(engine.optimizer, "param_groups", None) or []


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {float(value):g}" for name, value in settings.items())


def _of_all(names: list[str]) -> list[str]:
    """The names that any rank has found, in order."""
    return list(dict.fromkeys(name for of_rank in gathered(lambda: names, "looking at weights") for name in of_rank))


def _listed(kind: str, names: list[str]) -> str:
    return f"NaN or inf in the {kind} of {some(names, _SHOWN)}"


def _fault(where: str, got: str) -> Fault:
    return Fault(
        code="not-finite",
        what="training has come to NaN or inf",
        where=where,
        got=got,
        expected="a finite loss, gradients and weights on every rank",
        next=_NEXT,
    )
