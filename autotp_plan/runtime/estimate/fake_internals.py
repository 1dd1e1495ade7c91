"""The private names of torch behind tensors without data. No other file says them; `tests/runtime/test_canaries.py`
asserts them in a second.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
    return _WithoutData(allow_non_fake_inputs=True)


class _WithoutData(FakeTensorMode):  # type: ignore[no-untyped-call]
    """torch's rule for the shape of products in groups refuses all dtypes but bf16; the operator takes others too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return super().__torch_dispatch__(func, types, args, kwargs)
        factors = [one.to(torch.bfloat16) for one in args[:2]]
        product: Any = super().__torch_dispatch__(func, types, (*factors, *args[2:]), kwargs)
        return product.to(args[0].dtype)


def count_operations() -> FlopCounterMode:
    """While active in a `with`, counts the operations of matrix products, convolutions and attention.

    torch counts them, but for the attention of CPUs and products in groups: a row of the first matrix is multiplied by
    one of the second ones. Relies on `torch.ops.aten._grouped_mm` and `_scaled_dot_product_flash_attention_for_cpu`.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    further = {attention: _of_attention, backward: _of_attention_backward, torch.ops.aten._grouped_mm: _of_groups}
    fused = torch.ops.autotp_plan
    further |= {fused.attention: _of_attention, fused.attention_backward: _of_attention_backward}
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

    Tensors that share memory count once. What an operator would read from a tensor without data is 1, or 0 of integers,
    or False. Relies on weak references to storages, on `aten._local_scalar_dense` being what `item()` calls, and on
    collectives being operators of the namespace `c10d` whose arguments hold a process group that `ProcessGroup.unbox`
    gives.

    Args:
        on_collective: called with the operator's name, the process group, and the bytes of the largest of its tensors.
        held: tensors that were there before, and do not count.
        name: called for each new tensor: what it is for.

    Attributes:
        live: bytes that are held now.
        peak: the most since the last `restart_peak`.
        parts: `live` by what it is for.
        peak_parts: `peak` by what it is for.
    """

    def __init__(
        self,
        on_collective: Callable[[str, Any, int], None],
        held: Iterable[Tensor] = (),
        name: Callable[[], str] = lambda: "",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.parts: Counter[str] = Counter()
        self.peak_parts: Counter[str] = Counter()
        self.at_new_peak: Callable[[], None] = lambda: None
        self._on_collective, self._name = on_collective, name
        self._known: dict[int, Any] = {id(one): (one, "") for one in (tensor.untyped_storage() for tensor in held)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ and isinstance(args[0], FakeTensor):
            return _VALUES.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        if func.namespace == "c10d":
            self._see(func, args)
        result = func(*args, **(kwargs or {}))
        for one in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
            if isinstance(one, Tensor) and not one.is_meta:
                self._count(one, None)
        return result

    def restart_peak(self) -> int:
        """The largest number of bytes since the last call."""
        peak, self.peak = self.peak, self.live
        self.peak_parts = self.parts.copy()
        return peak

    def rename(self, tensors: Iterable[Tensor], what: str) -> None:
        """Say what tensors are for, from now on; such as were not known count from now on."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            if key not in self._known:
                self._count(tensor, what)
                continue
            reference, before = self._known[key]
            size = tensor.untyped_storage().nbytes()
            self.parts[before] -= size
            self.parts[what] += size
            self._known[key] = (reference, what)

    def _count(self, tensor: Tensor, what: str | None) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.live -= size
            self.parts[self._known.pop(key)[1]] -= size

        what = self._name() if what is None else what
        self._known[key] = (weakref.ref(storage, freed), what)
        self.live += size
        self.parts[what] += size
        if self.live > self.peak:
            self.peak, self.peak_parts = self.live, self.parts.copy()
            self.at_new_peak()

    def _see(self, func: Any, args: Any) -> None:
        leaves = pytree.tree_leaves(args)
        group = next(torch.distributed.ProcessGroup.unbox(one) for one in leaves if isinstance(one, torch.ScriptObject))
        sizes = [one.numel() * one.element_size() for one in leaves if isinstance(one, Tensor)]
        self._on_collective(func.name().partition("::")[2], group, max(sizes, default=0))


_READ = torch.ops.aten._local_scalar_dense.default
_VALUES: dict[Any, Any] = {torch.bool: False}


@contextlib.contextmanager
def engine_without_data(model: nn.Module) -> Iterator[None]:
    """While active, DeepSpeed's engine can be made of a model without data, and trains it.

    Its tensors cannot be moved by `Module.to`, so their dtypes are changed in place. What ZeRO 3 gathers from all
    ranks to compare it is not there to be compared. fp16 is trained in on any machine. Relies on
    `assert_ints_same_as_other_ranks` of DeepSpeed's `partitioned_param_coordinator`.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    for name, dtype in (("bfloat16", torch.bfloat16), ("half", torch.float16), ("float", torch.float32)):
        setattr(model, name, functools.partial(_convert, model, dtype))
    model.to = lambda *_, **__: model  # type: ignore[method-assign]
    compare = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = lambda _: None
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported
        coordinator.assert_ints_same_as_other_ranks = compare


def _convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    return model


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """While active, attention takes what fused kernels of GPUs take: no matrix of all pairs of tokens.

    Kept for the backward: query, key, value, output, and a float32 number per query and head (the logarithm of the sum
    of exponentials; Dao et al., FlashAttention, 2022). On tensors without data alone. Not by a mode of torch: those are
    left while autograd runs, in which layers may be computed again.
    """
    given = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = given


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, sums = _FUSED(query, key, value)
        ctx.save_for_backward(query, key, value, output, sums)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _FUSED_BACKWARD(grad_output, *ctx.saved_tensors)  # type: ignore[no-any-return]


def _fused(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _fused_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


torch.library.define("autotp_plan::attention", "(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)")
torch.library.define(
    "autotp_plan::attention_backward",
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor sums)"
    " -> (Tensor, Tensor, Tensor)",
)
_FUSED = torch.ops.autotp_plan.attention.default
_FUSED_BACKWARD = torch.ops.autotp_plan.attention_backward.default
torch.library.register_fake("autotp_plan::attention", _fused)
torch.library.register_fake("autotp_plan::attention_backward", _fused_backward)


_MAKERS = (
    ("/torch/optim/", "optimizer"),
    ("/deepspeed/runtime/zero/part", "gathering"),  # partition_parameters, ..._coordinator
    ("/deepspeed/runtime/", "engine"),
    ("/transformers/", "model"),
)


def maker_of(frame: FrameType | None) -> str:
    """Who makes a tensor, by the code on the stack that is nearest to it and known.

    Relies on where DeepSpeed's and torch's files lie, and on `torch.autograd.graph._engine_run_backward`, below which
    autograd runs.

    Returns:
        `optimizer`, `gathering` (of ZeRO 3), `engine`, `model`, `autograd`; or nothing.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            return "autograd"
        for part, maker in _MAKERS:
            if part in code.co_filename:
                return maker
        frame = frame.f_back
    return ""
