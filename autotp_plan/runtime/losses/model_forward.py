"""What happens around a model's forward, in the forward itself: a call of `model.forward(...)` runs no hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn


def run_forward_in(model: nn.Module, during: Callable[[Any, Any], AbstractContextManager[None] | None]) -> None:
    """From now on, run the forward of `model` in what `during` returns for it.

    Args:
        model: the model, which gets a `forward` that calls the one it has.
        during: called with the model, or its copy, and the `labels` of the call; None changes nothing.
    """
    before = vars(model).get("forward")  # of this model alone; else that of its class, when it is called
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = during(self, {**dict(zip(names, args)), **kwargs}.get("labels"))
        call = before or functools.partial(type(self).forward, self)
        if context is None:  # torch.compile does not trace every context
            return call(*args, **kwargs)
        with context:
            return call(*args, **kwargs)

    model.forward = MethodType(forward, model)
