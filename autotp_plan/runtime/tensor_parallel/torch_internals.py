"""The private names of torch. No other file says them; `tests/runtime/test_canaries.py` asserts them in a second."""

from __future__ import annotations

import functools
import importlib
import io
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autotp_plan.schemas.upstream import private, replaced

_F = TypeVar("_F", bound=Callable[..., Any])

FSDPParamGroup: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group").FSDPParamGroup
"""What `fully_shard` makes of the parameters of one module, however a script has imported it.

Relies on `FSDPParamGroup.__init__(params, modules, ...)`.
"""


OperatorMode: Any = TorchDispatchMode
"""The base of modes that see every operator. Relies on its place, `torch.utils._python_dispatch`."""


def eager(function: _F) -> _F:
    """`function`, which `torch.compile` calls as it is, between two graphs: a graph knows nothing of the other ranks.

    What `function` calls is not compiled either.
    """
    called: _F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return called


def version_of(tensor: Tensor) -> int:
    """A number that grows when `tensor` is changed in place. Relies on `Tensor._version`."""
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that `tensor` is a view of, or None. Relies on `Tensor._base`."""
    return tensor._base


def alias_of(tensor: Tensor) -> Tensor:
    """A tensor without gradient that shares memory and version with `tensor`, also where an operator is dispatched.

    Relies on `torch._C._SetExcludeDispatchKeyGuard`, with which torch's own selective checkpointing does the same.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def storage_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor shares with its views. Relies on `UntypedStorage._cdata`."""
    return int(tensor.untyped_storage()._cdata)


@functools.cache
def _changed_arguments(operator: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and keywords of the arguments that an operator changes. Relies on `OpOverload._schema`."""
    written = [
        (at, one) for at, one in enumerate(operator._schema.arguments) if one.alias_info and one.alias_info.is_write
    ]
    return tuple(at for at, one in written if not one.kwarg_only), tuple(one.name for _, one in written)


def changed_by(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    """The tensors that an operator changes in place, of those that it is given."""
    positions, names = _changed_arguments(operator)
    if not names:
        return []
    found = [args[at] for at in positions if at < len(args)]
    found += [kwargs[name] for name in names if kwargs and name in kwargs]
    return [one for one in pytree.tree_leaves(found) if isinstance(one, Tensor)]


def on_saving(notify: Callable[[], None]) -> AbstractContextManager[None]:
    """While active, `notify` is called for each tensor that autograd saves by the hooks that are active already.

    Relies on `torch._C._autograd._top_saved_tensors_default_hooks`, which gives these.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return nullcontext()
    pack, unpack = hooks

    def noted(tensor: Tensor) -> Any:
        notify()
        return pack(tensor)

    found: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(noted, unpack)
    return found


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


@functools.cache
def says_where_tensors_lie() -> bool:
    """Whether `torch.load(..., map_location="meta")` says where in the file the elements are: torch 2.7 or later.

    Relies on `UntypedStorage._checkpoint_offset`.
    """
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    file.seek(0)
    found = torch.load(file, map_location="meta", weights_only=True)
    return getattr(found.untyped_storage(), "_checkpoint_offset", None) is not None


def position_in_file(tensor: Tensor) -> int:
    """The byte at which the first element lies of a tensor that `torch.load(file, map_location="meta")` made.

    Only where `says_where_tensors_lie()`. Relies on `UntypedStorage._checkpoint_offset`.
    """
    start: Any = tensor.untyped_storage()._checkpoint_offset
    return int(start) + int(tensor.storage_offset()) * tensor.element_size()


def holds_a_tensor(tree: Any) -> bool:
    """Whether a tensor is in `tree` (tuples, lists, dicts). Relies on `torch.utils._pytree`."""
    return any(isinstance(one, Tensor) for one in pytree.tree_leaves(tree))


def forward_pre_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """The functions that are called before `module.forward`. Relies on `Module._forward_pre_hooks`."""
    return module._forward_pre_hooks.values()


def forward_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """The functions that are called after `module.forward`. Relies on `Module._forward_hooks`."""
    return module._forward_hooks.values()


def tensor_of(module: nn.Module, name: str) -> Any:
    """The parameter or buffer `name` that `module` holds, whatever its class shows as the attribute `name`.

    Relies on `Module._parameters`, which ZeRO 3 replaces to put parameters together, and on `Module._buffers`.
    """
    for held in (module._parameters, module._buffers):
        if name in held:
            return held[name]
    raise AttributeError(f"{type(module).__name__} has no parameter or buffer {name}")


def total_norm_function() -> Callable[..., Tensor]:
    """The function with which `torch.nn.utils.clip_grad_norm_` computes the norm of all gradients.

    It is also `torch.nn.utils.get_total_norm`. Relies on `torch.nn.utils.clip_grad._get_total_norm`.
    """
    function: Callable[..., Tensor] = clip_grad._get_total_norm
    return function


def replace_total_norm_function(function: Callable[..., Tensor]) -> None:
    """Let `torch.nn.utils.clip_grad_norm_` and `get_total_norm` use `function`, also where either was imported before.

    Relies on `clip_grad_norm_` looking up `_get_total_norm` in its module when it is called.
    """
    replaced = total_norm_function()
    for module in list(sys.modules.values()):
        for name in ("_get_total_norm", "get_total_norm"):
            if getattr(module, "__dict__", {}).get(name) is replaced:
                setattr(module, name, function)


@contextmanager
def muon_orthogonalises_with(function: Callable[..., Tensor]) -> Iterator[None]:
    """While active, `torch.optim.Muon` calls `function(gradient, coefficients, steps, eps)`.

    Relies on it looking up `torch.optim._muon._zeropower_via_newtonschulz` when it is called.
    """
    module = importlib.import_module("torch.optim._muon")
    private(module, "_zeropower_via_newtonschulz", "torch", "comparing Muon's steps")
    with replaced(module, "_zeropower_via_newtonschulz", function):
        yield


class Communicates(Exception):
    """A collective was called where `NoCommunication` is active."""


class NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active in a `with`, a collective of torch.distributed raises Communicates and communicates nothing.

    Relies on collectives being operators of the namespaces `c10d` and `_c10d_functional`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise Communicates(str(func))
        return func(*args, **(kwargs or {}))


def tensor_functions(*names: str) -> set[Any]:
    """The functions and attributes of tensors of these names, as `__torch_function__` is given them."""
    found: set[Any] = set()
    for name in names:
        of_tensors: Any = getattr(Tensor, name, None)
        found.add(of_tensors.__get__ if hasattr(type(of_tensors), "__set__") else of_tensors)
        found.add(getattr(torch, name, None))
    return found - {None}
