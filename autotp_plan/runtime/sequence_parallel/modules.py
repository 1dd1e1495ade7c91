"""Modules of a model whose residual stream is sharded along the sequence. Each keeps the forward of its class."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.huggingface.internals import FEATURES_OF_IMAGES, is_capturing
from autotp_plan.runtime.deepspeed.internals import overlaps_communication
from autotp_plan.runtime.sequence_parallel.stream import Stream, StreamShape
from autotp_plan.runtime.tensor_parallel.dropout_rng import enter_sharded_region, leave_sharded_region
from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer
from autotp_plan.runtime.tensor_parallel.torch_internals import eager, forward_pre_hooks
from autotp_plan.schemas.errors import Fault, MismatchError


class _OfStream(nn.Module):
    """What these classes share: mixed into a module's class, they know its stream and its name."""

    tp_stream: Stream
    tp_stream_name: str
    tp_first_input: str


class StreamModel(_OfStream):
    """The module that calls the layers. Whatever way it ends, an error too, the stream is not sharded after it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(getattr(self, "config", None), "output_hidden_states", None)
        if asked and torch.is_grad_enabled():
            raise MismatchError(_states_of_shards())
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.tp_stream.shape = None


class StreamLayer(_OfStream):
    """A layer between two points of the sharded stream, a decoder layer; the first shards it.

    Without gradients (in evaluation, in `generate`) the stream stays as it is, and every rank holds all tokens.
    """

    tp_is_first: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, shape = self._enter(args, kwargs)
        return super().__call__(*args, **kwargs) if shape is None else super().__call__(*args, tp_shape=shape, **kwargs)

    def forward(self, *args: Any, tp_shape: StreamShape | None = None, **kwargs: Any) -> Any:
        with self.tp_stream.of(tp_shape):
            if tp_shape is None or not self.training:
                return super().forward(*args, **kwargs)
            enter_sharded_region(f"{self.tp_stream_name}.stream", self.tp_stream.tp_rank)
            output = super().forward(*args, **kwargs)
            leave_sharded_region()
            return output

    @eager
    def _enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], StreamShape | None]:
        """The arguments, the stream sharded where this is the first layer."""
        stream = self.tp_stream
        if self.tp_is_first:
            stream.shape = None
            if torch.is_grad_enabled():
                _refuse_capture()
                args, kwargs = _with_first(self.tp_first_input, args, kwargs, stream.begin)
        elif torch.is_grad_enabled() and stream.shape is None:
            raise MismatchError(_not_begun(self.tp_stream_name))
        return args, kwargs, stream.shape


class GatherInput(_OfStream):
    """A module that is given every token, by an all-gather of its first input.

    The all-gather may wait for the first product where all of its layers are parallel ones: kernels of others would
    take a rank's tokens for all of them.
    """

    tp_may_wait: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.tp_stream.shape is not None:
            args, kwargs = self._gathered(args, kwargs, torch.compiler.is_compiling())
        return super().forward(*args, **kwargs)

    @eager
    def _gathered(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at_once: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.training:
            leave_sharded_region()
        may_wait = self.tp_may_wait and not at_once and not forward_pre_hooks(self)  # ZeRO 3 has some
        overlaps = may_wait and overlaps_communication()
        gather = self.tp_stream.gather_later if overlaps else self.tp_stream.gather
        return _with_first(self.tp_first_input, args, kwargs, gather)


class GatherInputOfLayer(_OfStream):
    """`GatherInput` of a parallel layer, before its hooks, as its own collective is."""

    @eager
    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.tp_stream.shape is not None:
            if self.training:
                leave_sharded_region()
            input = self.tp_stream.gather(input)
        return super().__call__(input, *args, **kwargs)


class SplitOutput(_OfStream):
    """A module whose output has all tokens, and of whose output (the first, of several) each rank keeps its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return output if self.tp_stream.shape is None else self._split(output)

    @eager
    def _split(self, output: Any) -> Any:
        output = _changed(output, self.tp_stream.split)
        if self.training:
            enter_sharded_region(f"{self.tp_stream_name}.stream", self.tp_stream.tp_rank)
        return output


class EndOfStream(_OfStream):
    """The last module of the sharded stream: its output (the first, of several) has all tokens again."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._gathered_output(super().__call__(*args, **kwargs))

    @eager
    def _gathered_output(self, output: Any) -> Any:
        return output if self.tp_stream.shape is None else _changed(output, self.tp_stream.end)


def become(module: nn.Module, kind: type[_OfStream], stream: Stream, name: str) -> None:
    """Make `module` one of these, in place: its class becomes a subclass of what it was, of the same name."""
    cls = type(module)
    if kind is GatherInput and isinstance(module, PlannedLayer):
        kind = GatherInputOfLayer
    methods: dict[str, Any] = {"__module__": cls.__module__}
    if kind is StreamModel and hasattr(cls, FEATURES_OF_IMAGES):
        methods[FEATURES_OF_IMAGES] = _of_own_tokens(getattr(cls, FEATURES_OF_IMAGES))
    module.__class__ = type(cls.__name__, (kind, cls), methods)
    settings = {"tp_stream": stream, "tp_stream_name": name}
    if kind in (StreamLayer, GatherInput):
        settings["tp_first_input"] = _first_input(cls)
    for attribute, value in settings.items():
        setattr(module, attribute, value)


def _of_own_tokens(add_features: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method that adds features of images to hidden states: to those of this rank's tokens, the features of these."""

    def add(model: StreamModel, hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        if model.tp_stream.shape is not None:
            mask, features = model.tp_stream.own_rows(mask, features)
        return add_features(model, hidden, mask, features)

    return add


def has_forward(module: nn.Module) -> bool:
    """Whether the module computes something itself, unlike a list of modules."""
    return any("forward" in vars(cls) for cls in type(module).__mro__ if cls is not nn.Module)


def _with_first(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward whose first is `name`, the first of them changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, name: change(kwargs[name])}


def _first_input(cls: type) -> str:
    """The name of the first argument of a class's forward, behind those that hand on whatever they get."""
    for one in cls.__mro__:
        if "forward" in vars(one):
            first = next(itertools.islice(inspect.signature(one.forward).parameters.values(), 1, None), None)  # type: ignore[attr-defined]
            if first is not None and first.kind is not inspect.Parameter.VAR_POSITIONAL:
                return first.name
    raise AssertionError(f"{cls.__name__} has no forward with an input")


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output, the first tensor of several changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _refuse_capture() -> None:
    if is_capturing("hidden_states"):
        raise MismatchError(_states_of_shards())


def _states_of_shards() -> Fault:
    return Fault(
        code="hidden-states-of-shards",
        what="the hidden states of layers are asked for, and each rank holds its tokens of them",
        where="output_hidden_states=True",
        got="a training step of a plan with sequence parallelism",
        expected="a forward without output_hidden_states, or one under torch.no_grad()",
        next="call the model under torch.no_grad(), or compile the plan without --sequence-parallel",
    )


def _not_begun(layer: str) -> Fault:
    return Fault(
        code="stream-not-sharded",
        what="a layer is called, and the layer that shards its sequence was not",
        where=layer,
        got="a layer that is called by itself, or a first layer that was skipped (layerdrop)",
        expected="the model's layers one after the other, from the first",
        next="call the model, not a layer of it; set layerdrop to 0; or compile the plan without --sequence-parallel",
    )
