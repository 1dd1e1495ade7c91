"""The methods of an engine from `initialize` that look for NaN and inf: backward, step and save_checkpoint."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from deepspeed import DeepSpeedEngine

from autotp_plan.runtime.optimizers.finite import FiniteCheck


class StopsAtNonFinite(DeepSpeedEngine if TYPE_CHECKING else object):  # type: ignore[misc]
    """Methods of an engine, before those of its class."""

    finite_check: FiniteCheck

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; the loss is looked at on its device."""
        self.finite_check.see(loss)
        return super().backward(loss, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's.

        Raises:
            NonFiniteError: a loss or a gradient was NaN or inf. The same on every rank.
        """
        with self.finite_check.during_step():
            return super().step(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's.

        Raises:
            NonFiniteError: a weight is NaN or inf. The same on every rank, before anything is written.
        """
        self.finite_check.before_save()
        return super().save_checkpoint(*args, **kwargs)


def become_checked_engine(engine: Any, check: FiniteCheck) -> None:
    """Give an engine its check, and the class that calls it, in place.

    Args:
        engine: what `deepspeed.initialize` made.
        check: of the engine.
    """
    engine.finite_check = check
    if not isinstance(engine, StopsAtNonFinite):
        cls: Any = type(engine)
        engine.__class__ = _checked_class(cls)


@functools.cache
def _checked_class(cls: Any) -> Any:
    return type(cls.__name__, (StopsAtNonFinite, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
