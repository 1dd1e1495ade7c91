"""Letting an optimizer step some of its parameters after others, as if all had been stepped at once.

The optimizer is the user's, of any class. All that is done to it is that its `param_groups` hold fewer parameters while
its `step` runs, and that the numbers it counts in (of a group, or of itself) are set back before it runs again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


class OneStep:
    """One step of an optimizer, taken for some of its parameters at a time.

    Args:
        optimizer: the optimizer.
        step: its `step`.
    """

    def __init__(self, optimizer: Any, step: Callable[[], Any]) -> None:
        self._optimizer, self._step = optimizer, step
        self._groups = [_values(group) for group in optimizer.param_groups]
        self._numbers = _numbers(vars(optimizer)), _numbers(optimizer.state)
        self._after: dict[int, dict[str, Any]] = {}

    def take(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        """Step these parameters of each group, and no others."""
        optimizer = self._optimizer
        groups = list(optimizer.param_groups)
        before = [group["params"] for group in groups]
        vars(optimizer).update(self._numbers[0])
        optimizer.state.update(self._numbers[1])
        for group, values, some in zip(groups, self._groups, parameters, strict=True):
            _set_values(group, values)
            group["params"] = list(some)
        optimizer.param_groups[:] = [group for group, some in zip(groups, parameters) if some]
        try:
            self._step()
        finally:
            optimizer.param_groups[:] = groups
            for group, all_of_it in zip(groups, before):
                group["params"] = all_of_it
        self._after |= {at: _values(group) for at, group in enumerate(groups) if parameters[at]}

    def end(self) -> None:
        """Leave the numbers of each group as the step of its parameters left them."""
        for at, values in self._after.items():
            _set_values(self._optimizer.param_groups[at], values)


def _numbers(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _values(group: dict[str, Any]) -> dict[str, Any]:
    """What a group holds beside its parameters, copied where it could be changed in place."""
    return {key: _copied(value) for key, value in group.items() if key != "params"}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def _set_values(group: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Tensor) and isinstance(group[key], Tensor):
            group[key].detach().copy_(value)
        else:
            group[key] = _copied(value)
    for key in group.keys() - values.keys() - {"params"}:
        del group[key]
