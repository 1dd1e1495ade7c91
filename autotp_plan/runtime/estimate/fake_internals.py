"""The private names of torch behind tensors without data. No other file says them; `tests/runtime/test_canaries.py`
asserts them in a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


def join_fake_world(rank: int, world_size: int) -> None:
    """Make this process a rank of a world that is not there: its collectives return at once and change nothing.

    Relies on the backend `fake` and on `torch.testing._internal.distributed.fake_pg.FakeStore`.
    """
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def without_data() -> FakeTensorMode:
    """While active in a `with`, new tensors have shape, dtype and device, and no data.

    Relies on `torch._subclasses.fake_tensor.FakeTensorMode`. Its `from_tensor` gives a tensor's shape without its data.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def count_operations() -> FlopCounterMode:
    """While active in a `with`, counts the operations of matrix products, convolutions and attention.

    torch counts them, but for the attention of CPUs and products in groups: a row of the first matrix is multiplied by
    one of the second ones. Relies on `torch.ops.aten._grouped_mm` and `_scaled_dot_product_flash_attention_for_cpu`.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    further = {attention: _of_attention, backward: _of_attention_backward, torch.ops.aten._grouped_mm: _of_groups}
    counter = FlopCounterMode(display=False, custom_mapping=further)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """Counts are not told apart by module: that takes hooks, which keep what a layer computes again in the backward."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _of_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _of_attention_backward(
    grad_output: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    count = sdpa_backward_flop_count(grad_output, query, key, value)  # type: ignore[no-untyped-call]
    return int(count)


def _of_groups(first: torch.Size, second: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * first[-2] * first[-1] * second[-1]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active in a `with`, counts the bytes of the tensors that operators make, and sees every collective.

    Tensors that share memory count once. Relies on weak references to storages, and on collectives being operators of
    the namespace `c10d` whose arguments hold a process group that `ProcessGroup.unbox` gives.

    Args:
        on_collective: called with the operator's name, the process group, and the bytes of the largest of its tensors.
        held: tensors that were there before, and do not count.
    """

    def __init__(self, on_collective: Callable[[str, Any, int], None], held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._on_collective = on_collective
        self._known: dict[int, Any] = {id(one): one for one in (tensor.untyped_storage() for tensor in held)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._see(func, args)
        result = func(*args, **(kwargs or {}))
        for one in pytree.tree_leaves(result):
            if isinstance(one, Tensor) and not one.is_meta:
                self._count(one)
        return result

    def restart_peak(self) -> int:
        """The largest number of bytes since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _see(self, func: Any, args: Any) -> None:
        leaves = pytree.tree_leaves(args)
        group = next(torch.distributed.ProcessGroup.unbox(one) for one in leaves if isinstance(one, torch.ScriptObject))
        sizes = [one.numel() * one.element_size() for one in leaves if isinstance(one, Tensor)]
        self._on_collective(func.name().partition("::")[2], group, max(sizes, default=0))
