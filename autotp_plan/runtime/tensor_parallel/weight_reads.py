"""Code that reads the weight of a sharded layer, where the layer should be called: then its collectives are skipped.

Fused kernels do. In training with CUDA, a Mamba 2 mixer of transformers hands `norm.weight` and `out_proj.weight` to
one function and calls neither layer. No run on a CPU shows it, so it is found in the source of the class. Such a mixer
keeps to its other path, which calls its layers; anything else that reads the weight of a sharded layer is refused.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

from torch import Tensor, nn

from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_functions, without_torch_function

FUSED_IN_TRAINING = frozenset(
    {"mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined", "mamba_inner_fn"}
)
"""Functions that take the weights of a mixer's layers, and that transformers' mixers call in training alone."""

_OUTLINE = frozenset(
    {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "data_ptr", "requires_grad", "is_cuda", "is_meta",
     "is_floating_point", "grad", "element_size", "itemsize", "layout"}
)  # fmt: skip
"""What may be asked of a weight without computing with it."""


def layers_read(module: nn.Module) -> set[str]:
    """The layers in `module` whose `weight` its methods use, except for its dtype, device or shape."""
    return {read.layer for read in _reads_of(module) if not read.fused}


def layers_fused(module: nn.Module) -> set[str]:
    """The layers in `module` whose `weight` its methods give to one of `FUSED_IN_TRAINING`."""
    return {read.layer for read in _reads_of(module) if read.fused}


class WithoutFusedKernels:
    """The forward of a mixer that calls its layers, in training too; mixed into the mixer's class."""

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, False  # its layers keep theirs
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.training = training


def keep_from_fused_kernels(module: nn.Module) -> None:
    """Let a mixer call its layers, in place: its class becomes a subclass of what it was."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (WithoutFusedKernels, cls), {"__module__": cls.__module__})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """A place where code uses the weight of a layer.

    Attributes:
        layer: the layer's name in the module.
        fused: whether the weight is an argument of a fused function.
        conditions: expressions of the module's settings (`self.pretraining_tp > 1`), with the value that each must have
            for the code to be reached.
    """

    layer: str
    fused: bool
    conditions: tuple[tuple[str, bool], ...]

    def is_reached(self, module: nn.Module) -> bool:
        """Whether the module's settings let it come to this; where that cannot be said, they do."""
        for expression, needed in self.conditions:
            try:
                if bool(eval(expression, {"__builtins__": {}}, {"self": module})) is not needed:
                    return False
            except Exception:  # a property may raise anything; then the code counts as reached, and is refused
                continue
        return True


def _reads_of(module: nn.Module) -> Iterator[_Read]:
    cls: Any = type(module)
    return (read for read in _reads_of_class(cls) if read.is_reached(module))


@functools.cache
def _reads_of_class(cls: Any) -> frozenset[_Read]:
    return frozenset(read for tree in _methods(cls) for read in _reads(tree))


def _methods(cls: type) -> Iterator[ast.AST]:
    """The syntax trees of a class and of those that it inherits from, without torch's."""
    for one in cls.__mro__:
        if not issubclass(one, nn.Module) or one.__module__.startswith("torch."):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(one))
        except (OSError, TypeError):
            continue  # a class that was made at run time; those that it inherits from have a source
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith(_BEFORE):
                yield node


_BEFORE = ("__init__", "_init_", "init_", "reset_", "extra_repr", "_load_")
"""How the names of methods begin that run before a model is sharded, or compute nothing."""


def _reads(tree: ast.AST) -> Iterator[_Read]:
    """The places where the weight of a layer is used."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "weight"
            and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id == "self"
            and not _asks_for_the_outline(node, parents[node])
        ):
            yield _Read(
                layer=node.value.attr,
                fused=any(map(_is_fused, _ancestors(node, parents))),
                conditions=tuple(_conditions(node, parents)),
            )


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[str, bool]]:
    """The tests of the `if`s around a node that the module's settings decide, and what each must be."""
    for parent in _ancestors(node, parents):
        if isinstance(parent, (ast.If, ast.IfExp)) and node is not parent.test and _is_of_settings(parent.test):
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            yield ast.unparse(parent.test), node in body
        node = parent


def _is_of_settings(test: ast.expr) -> bool:
    """Whether an expression compares attributes of `self` and constants, and `training`, which changes, is none."""
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id == "self") or node.attr == "training":
                return False
        elif not isinstance(node, _OF_SETTINGS):
            return False
    return True


_OF_SETTINGS = (
    ast.Name, ast.Constant, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.expr_context,
)  # fmt: skip


def _ancestors(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def _is_fused(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUSED_IN_TRAINING


def _asks_for_the_outline(node: ast.AST, parent: ast.AST) -> bool:
    if isinstance(parent, ast.Attribute):
        return parent.attr in _OUTLINE
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in ("isinstance", "hasattr", "getattr")
    return isinstance(parent, ast.Compare)  # `is None`


# --- while a plan is proven -------------------------------------------------------------------------------------------

Reads = dict[str, str]
"""For the name of a parameter, which code read it: `MLP.forward (modeling_x.py:12)`."""


class _Watching:
    """What is watched now, in this process."""

    reads: ClassVar[Reads | None] = None
    handed_out: ClassVar[list[_Watched]] = []


@contextmanager
def watch_reads() -> Iterator[Reads]:
    """Collect who reads the weights of sharded layers and is not the layer, while active.

    Code that asks for the dtype, the device or the shape of a weight alone does not count.
    """
    _Watching.reads, _Watching.handed_out = {}, []
    try:
        yield _Watching.reads
    finally:
        for one in _Watching.handed_out:
            if not one.asked_outline:  # given to a function that ignored it, as the stand-ins of fused kernels do
                _Watching.reads.setdefault(one.parameter, one.reader)
        _Watching.reads, _Watching.handed_out = None, []


def watched(layer: nn.Module, name: str, weight: Any) -> Any:
    """A layer's weight for who asks for it: itself, or while reads are watched a tensor that tells what it is for.

    Args:
        layer: the layer.
        name: of the parameter in the model.
        weight: the parameter.
    """
    if _Watching.reads is None or not isinstance(weight, Tensor):
        return weight
    reader = _reader(layer)
    if reader is None:
        return weight
    found = weight.detach().as_subclass(_Watched)
    found.weight, found.parameter, found.reader, found.asked_outline = weight, name, reader, False
    _Watching.handed_out.append(found)
    return found


def _reader(layer: nn.Module) -> str | None:
    """The code that reads a weight; None for the layer's."""
    frame: FrameType | None = inspect.currentframe()
    here = {__file__, inspect.getsourcefile(type(layer))}
    while frame is not None and frame.f_code.co_filename in here:
        if frame.f_code.co_filename != __file__ and frame.f_code.co_name not in ("weight", "bias"):
            return None  # a method of the layer
        frame = frame.f_back
    if frame is None:
        return None
    owner = type(frame.f_locals["self"]).__name__ + "." if "self" in frame.f_locals else ""
    file = frame.f_code.co_filename.rpartition("/")[2]
    return f"{owner}{frame.f_code.co_name} ({file}:{frame.f_lineno})"


class _Watched(Tensor):
    """A weight that notes whether code computes with it."""

    weight: Tensor
    parameter: str
    reader: str
    asked_outline: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OUTLINE_FUNCTIONS and args and isinstance(args[0], cls):
            args[0].asked_outline = True
            with without_torch_function():
                return func(*args, **kwargs)
        return func(*(_read(one) for one in args), **{key: _read(one) for key, one in kwargs.items()})


_OUTLINE_FUNCTIONS = tensor_functions(*_OUTLINE)


def _read(value: Any) -> Any:
    """The weight in the place of what stands for it, which is noted; lists too."""
    if isinstance(value, _Watched):
        if _Watching.reads is not None:
            _Watching.reads[value.parameter] = value.reader
        return value.weight
    if isinstance(value, (list, tuple)) and any(isinstance(one, _Watched) for one in value):
        return type(value)(_read(one) for one in value)
    return value
