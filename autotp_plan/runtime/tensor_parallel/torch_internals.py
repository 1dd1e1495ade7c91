"""The private names of torch. No other file says them; `tests/runtime/test_canaries.py` asserts them in a second."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def version_of(tensor: Tensor) -> int:
    """A number that grows when `tensor` is changed in place. Relies on `Tensor._version`."""
    return tensor._version


def without_torch_function() -> AbstractContextManager[None]:
    """While active, subclasses of Tensor are ordinary tensors. Relies on `torch._C.DisableTorchFunctionSubclass`."""
    guard: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return guard


def assert_without_waiting(condition: Tensor, message: str) -> None:
    """Raise RuntimeError unless `condition`; CUDA is not waited for. Relies on `torch._assert_async`."""
    torch._assert_async(condition, message)


def map_tensors(kind: type[Tensor], function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` (tuples, lists, dicts) with `function` applied to each `kind` in it. Relies on `torch.utils._pytree`."""
    return pytree.tree_map_only(kind, function, tree)


def holds_a_tensor(tree: Any) -> bool:
    """Whether a tensor is in `tree` (tuples, lists, dicts). Relies on `torch.utils._pytree`."""
    return any(isinstance(one, Tensor) for one in pytree.tree_leaves(tree))


def forward_pre_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """The functions that are called before `module.forward`. Relies on `Module._forward_pre_hooks`."""
    return module._forward_pre_hooks.values()


def tensor_of(module: nn.Module, name: str) -> Any:
    """The parameter or buffer `name` that `module` holds, whatever its class shows as the attribute `name`.

    Relies on `Module._parameters`, which ZeRO 3 replaces to put parameters together, and on `Module._buffers`.
    """
    for held in (module._parameters, module._buffers):
        if name in held:
            return held[name]
    raise AttributeError(f"{type(module).__name__} has no parameter or buffer {name}")
