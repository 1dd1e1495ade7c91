"""Signals by which a scheduler asks a job to stop: all ranks stop after the same step."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes SIGTERM and SIGUSR1 in the place of what they did before, from now on.

    Args:
        device: of the tensor by which the ranks agree.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._asked = device, False
        for one in SIGNALS:
            signal.signal(one, self._note)

    def was_asked(self) -> bool:
        """Whether any rank was asked to stop. Every rank calls it; one small all-reduce."""
        asked = torch.tensor(int(self._asked), device=self._device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
