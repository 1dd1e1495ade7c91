"""Copies of a user's optimizer that step tensors of ours, and what such a copy keeps between its steps."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LR = 1e-2
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Kept:
    """What an optimizer keeps: tensors and numbers by where they are.

    Attributes:
        of_parameter: its state of the first parameter.
        of_optimizer: the numbers of its group and of itself.
        shape: the shape of the first parameter.
    """

    of_parameter: dict[str, Tensor]
    of_optimizer: dict[str, Tensor]
    shape: torch.Size

    def equals(self, others: Sequence[Kept], dim: int = 0) -> bool:
        """Whether `others`, of parts of the parameter along `dim`, or of all of it, are what is kept of all of it."""
        if any(self.of_parameter.keys() != one.of_parameter.keys() for one in others):
            return False
        for name, mine in self.of_parameter.items():
            parts = [(one.of_parameter[name], one.shape) for one in others]
            if len(others) == 1:
                joined = parts[0][0]
            elif mine.numel() > 1 and mine.numel() == self.shape.numel():
                if any(part.numel() != shape.numel() for part, shape in parts):
                    return False
                joined = torch.cat([part.reshape(shape) for part, shape in parts], dim)
            elif mine.numel() <= 1 and all(_close(mine, part) for part, _ in parts):
                continue
            else:
                return False
            if not _close(mine.reshape(-1), joined.reshape(-1)):
                return False
        return all(
            name in one.of_optimizer and _close(mine, one.of_optimizer[name])
            for name, mine in self.of_optimizer.items()
            for one in others
        )


def kept_by(optimizer: Any, parameters: Sequence[Tensor]) -> Kept:
    """What a copy keeps of the first of `parameters`, and of all together."""
    first = parameters[0]
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    numbers = {name: value for name, value in vars(optimizer).items() if _is_number(value)}
    return Kept(
        of_parameter=dict(_leaves(optimizer.state.get(first, {}), "state", set())),
        of_optimizer={**dict(_leaves(group, "group", set())), **dict(_leaves(numbers, "attribute", set()))},
        shape=first.shape,
    )


def set_counters(optimizer: Any, last_two: Sequence[Kept], number: int) -> None:
    """Set to `number` what counts steps: what has grown by 1 between `last_two`."""
    before, after = last_two
    names = {
        name
        for older, newer in (
            (before.of_parameter, after.of_parameter),
            (before.of_optimizer, after.of_optimizer),
        )
        for name in older.keys() & newer.keys()
        if newer[name].numel() == 1 and (newer[name] - older[name]).item() == 1
    }
    for state in optimizer.state.values():
        if isinstance(state, dict):
            _set_in(state, "state", names, number)
    for group in optimizer.param_groups:
        _set_in(group, "group", names, number)
    _set_in(vars(optimizer), "attribute", names, number)


def _set_in(values: dict[str, Any], path: str, names: set[str], number: int) -> None:
    for key, value in list(values.items()):
        if f"{path}.{key}" in names:
            if isinstance(value, Tensor):
                value.detach().fill_(number)
            else:
                values[key] = type(value)(number)


def _is_number(value: Any) -> bool:
    is_plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_plain or (isinstance(value, Tensor) and value.numel() == 1)


def _leaves(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers in a value, by where they are; what is no number counts as none."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # one of several tensors: quantised
        for name in value.__tensor_flatten__()[0]:
            yield from _leaves(getattr(value, name), f"{path}.{name}", seen)
    elif isinstance(value, Tensor):
        yield path, value.detach().clone()
    elif _is_number(value):
        yield path, torch.tensor(float(value), dtype=torch.float64)
    elif id(value) not in seen:
        seen.add(id(value))
        for key, one in _inside(value):
            yield from _leaves(one, f"{path}.{key}", seen)


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from ((key, one) for key, one in value.items() if not isinstance(key, Tensor))
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    elif not callable(value) and not isinstance(value, (type, types.ModuleType, nn.Module)):
        yield from getattr(value, "__dict__", {}).items()


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    if first.numel() == 0:
        return True
    one, other = (each.double().nan_to_num() for each in (first, second))
    return bool((one - other).abs().max() <= tolerance(first.dtype) * one.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding may make in a few steps."""
    return 1e-8 if dtype == torch.float64 else 1e-4


def copy_for(optimizer: Any, group: int, parameters: list[nn.Parameter], like: Tensor | None = None) -> Any:
    """A copy of `optimizer` that steps `parameters` and has taken no step yet. Its hooks are left out.

    Args:
        optimizer: the optimizer, which is not changed.
        group: the number of the group whose hyperparameters the copy has.
        parameters: what it steps.
        like: the parameter whose attributes they get, and what the optimizer kept of it when it was made.
    """
    for parameter in parameters if like is not None else ():
        vars(parameter).update({name: value for name, value in vars(like).items() if isinstance(value, _PLAIN)})
    hyperparameters = {key: value for key, value in optimizer.param_groups[group].items() if key != "params"}
    groups = [{**copy.deepcopy(hyperparameters), "params": list(parameters)}]
    if "lr" in hyperparameters:  # a warm-up begins with 0, with which nothing would be seen
        groups[0]["lr"] = _rate(hyperparameters["lr"])
    state: dict[Any, Any] = defaultdict(dict)
    state |= {key: copy.deepcopy(value) for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    initial = optimizer.state.get(like) if like is not None else None
    for parameter in parameters if initial else ():
        state[parameter] = _initial_state(initial, like, parameter)
    memo: dict[int, Any] = {id(optimizer.param_groups): groups, id(optimizer.state): state}
    for of_user in optimizer.param_groups:
        memo[id(of_user)] = groups[0]
        memo |= {id(parameter): parameters[0] for parameter in of_user["params"]}
    copied = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    memo |= {id(value): value for value in vars(optimizer).values() if isinstance(value, types.ModuleType)}
    hooks = {name for name, value in vars(optimizer).items() if isinstance(value, OrderedDict)}
    for name, value in vars(optimizer).items():
        if name != "step":  # where it is the instance's: a wrapper of a scheduler, around the user's optimizer
            vars(copied)[name] = OrderedDict() if name in hooks else copy.deepcopy(value, memo)
    return copied


def _rate(rate: Any) -> Any:
    if isinstance(rate, Tensor):
        return torch.full_like(rate, _LR)
    return _LR if isinstance(rate, (int, float)) else rate


def _initial_state(state: Any, like: Tensor | None, parameter: Tensor) -> dict[str, Any]:
    """What an optimizer keeps of a parameter before its first step: flags, counts, and tensors of one number."""
    found: dict[str, Any] = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor) and like is not None and value.shape == like.shape and value.numel() > 0:
            first = value.reshape(-1)[0]
            if not bool((value == first).all()):
                return dict(flags(state))  # it has taken steps
            found[name] = torch.full(parameter.shape, first.item(), dtype=value.dtype, device=parameter.device)
        elif isinstance(value, Tensor):
            found[name] = value.clone()
        elif isinstance(value, _PLAIN):
            found[name] = value
    return found


def flags(values: Any) -> Iterator[tuple[str, bool | str]]:
    """What of attributes or a state says how a parameter is stepped, such as `use_muon`; names are left out."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, bool) or (isinstance(value, str) and "." not in value):
            yield name, value
