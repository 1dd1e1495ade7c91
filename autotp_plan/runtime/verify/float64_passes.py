"""Forward and backward passes in float64, which both the sharded and the dense model run.

Only how a parameter or its gradient is read differs between the two, and that is an argument.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autotp_plan.runtime.loading.local_shard import local_shard
from autotp_plan.runtime.verify.report import Pass

ADAM = {"lr": 2e-3, "eps": 1e-3, "weight_decay": 0.01}
"""A first Adam step is lr * g / (|g| + eps): with an eps near the rounding error of g, noise becomes a full step."""
EXPERTS = {"experts_implementation": "eager"}
"""How transformers must run experts: its default, grouped matrix products, has no float64 kernel on CPU."""

BatchOf = Callable[[int], Any]
"""The batch of a seed."""
Forward = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""Loss and logits of a model for a batch: token ids of shape (batch, length), or the inputs by name."""
Read = Callable[[str, bool], Tensor | None]
"""The parameter of a name, or with True its gradient; None for a gradient that is not there."""
Numbers = dict[str, dict[str, Tensor]]
"""`loss` and `logits` by pass; by parameter `gradient` after one backward pass, `accumulated` after two, and `stepped`,
its value after two optimizer steps.
"""


class PromoteToFloat64(TorchFunctionMode):
    """While active, every conversion to float32 becomes one to float64.

    transformers casts norms, softmax and rotary tables to float32, which would hide errors below 1e-7.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def causal_lm(model: Any, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits of a causal language model of transformers, or of an engine around one."""
    inputs = _inputs(model, batch)
    output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    return output.loss, output.logits


def by_class(model: Any, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits of a transformers model of any class, or of an engine around one, with labels that fit it.

    A model without a head has no loss: it is given one of all elements of its last hidden state.
    """
    inputs = _inputs(model, batch)
    tokens = inputs["input_ids"]
    inside = getattr(model, "module", model)
    taken = inspect.signature(type(inside).forward).parameters
    if "start_positions" in taken:  # question answering
        positions = tokens[:, :2] % tokens.shape[1]
        output = model(**inputs, start_positions=positions[:, 0], end_positions=positions[:, 1])
        return output.loss, torch.stack((output.start_logits, output.end_logits))
    if "labels" not in taken:
        states = model(**inputs, use_cache=False).last_hidden_state
        weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype, device=states.device)
        return (states.flatten() * weights).mean(), states
    if not hasattr(inside, "num_labels") or inside.get_output_embeddings() is not None:
        return causal_lm(model, batch)
    labels = tokens % inside.num_labels
    if type(inside).__name__.endswith("ForSequenceClassification"):
        labels = labels[:, 1]
        if inside.num_labels == 1:  # a regression
            labels = tokens[:, 1].to(inside.dtype) / inside.config.vocab_size
    output = model(**inputs, labels=labels)
    return output.loss, output.logits


def _inputs(model: Any, batch: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a forward by name; images have the dtype of the model."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def dense_reader(model: nn.Module) -> Read:
    """Reads the parameters and gradients of an unsharded model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return lambda name, gradient: parameters[name].grad if gradient else parameters[name]


def shard_reader(model: nn.Module) -> Read:
    """Reads this rank's shards of parameters and gradients."""
    return lambda name, gradient: local_shard(model, name, gradient=gradient)


def run_passes(
    model: nn.Module,
    read: Read,
    names: Sequence[str],
    batches: BatchOf,
    *,
    forward: Forward = by_class,
    promote: bool = True,
) -> Numbers:
    """Two forward and backward passes, whose gradients accumulate.

    Args:
        model: in training mode, without gradients.
        read: `dense_reader(model)` or `shard_reader(model)`.
        names: the parameters to record; one without a gradient is left out of the result.
        batches: the tokens of each pass.
        forward: gives loss and logits.
        promote: keep all arithmetic in float64. Activations that autograd recomputes are not promoted either way.

    Returns:
        `loss`, `logits`, `gradient` and `accumulated`, detached.
    """
    found: Numbers = {kind: {} for kind in ("loss", "logits", "gradient", "accumulated")}
    for index, kind in ((Pass.FIRST, "gradient"), (Pass.SECOND, "accumulated")):
        _backward(model, batches, index, found, forward, promote)
        _record(found, kind, read, names)
    return found


def run_passes_and_steps(
    model: nn.Module, read: Read, names: Sequence[str], batches: BatchOf, forward: Forward = by_class
) -> Numbers:
    """As `run_passes`, and then an optimizer step, a third pass, and another step: `stepped` too."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM, foreach=False)  # type: ignore[arg-type]
    found = run_passes(model, read, names, batches, forward=forward)
    optimizer.step()
    optimizer.zero_grad()
    _backward(model, batches, Pass.AFTER_STEP, found, forward, True)
    optimizer.step()
    _record(found, "stepped", read, names)
    return found


def _backward(model: nn.Module, batches: BatchOf, index: Pass, found: Numbers, forward: Forward, promote: bool) -> None:
    with PromoteToFloat64() if promote else contextlib.nullcontext():
        loss, logits = forward(model, batches(index.seed))
        loss.backward()  # type: ignore[no-untyped-call]
    found["loss"][index.value], found["logits"][index.value] = loss.detach(), logits.detach()


def _record(found: Numbers, kind: str, read: Read, names: Sequence[str]) -> None:
    tensors = {name: read(name, kind != "stepped") for name in names}
    found[kind] = {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}
