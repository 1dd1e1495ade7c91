"""What a user's model is run on, and what of its output is compared: the contract of `--module`.

A model takes token ids as its first argument (and as `labels` or `targets`, where it takes those), or says itself what
it takes: `example_inputs()` returns the arguments of a forward. A scalar in the output is the loss; without one, the
loss is a weighted mean of the largest tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_plan.schemas.errors import Fault, MismatchError

HOOK = "example_inputs"
"""The method by which a model says what it takes."""
_LABELS = ("labels", "label", "targets", "target", "target_ids")
_ROWS = 2
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The arguments of one forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def to(self, dtype: torch.dtype) -> Batch:
        """The same with its floating-point tensors in `dtype`."""

        def changed(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Batch(
            args=tuple(map(changed, self.args)), kwargs={key: changed(one) for key, one in self.kwargs.items()}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Batches of token ids by seed: arguments by name, each `(2, length)`, random numbers below `words`.

    `off` are arguments that are False: a cache, which would hold what was computed before. With `uneven`, batches of
    odd seeds are a token shorter.
    """

    ids: str
    labels: tuple[str, ...]
    words: int
    length: int
    off: tuple[str, ...] = ()
    uneven: bool = False

    def __call__(self, seed: int) -> Batch:
        length = self.length - seed % 2 if self.uneven else self.length
        tokens = torch.randint(self.words, (_ROWS, length), generator=torch.Generator().manual_seed(seed))
        return Batch(kwargs={**dict.fromkeys((self.ids, *self.labels), tokens), **dict.fromkeys(self.off, False)})


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnBatches:
    """Batches that the model gives itself, each after torch was seeded with another number."""

    model: nn.Module

    def __call__(self, seed: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            given = getattr(self.model, HOOK)()
        if isinstance(given, Mapping):
            return Batch(kwargs=dict(given))
        if isinstance(given, (tuple, list)):
            return Batch(args=tuple(given), kwargs={})
        if isinstance(given, Tensor):
            return Batch(args=(given,), kwargs={})
        raise MismatchError(_bad_example(type(self.model).__name__, f"{HOOK}() returns {type(given).__name__}"))


def batches_for(model: nn.Module, length: int) -> Batches | OwnBatches:
    """What a model is run on.

    Args:
        model: with values.
        length: number of tokens in a row.

    Raises:
        MismatchError: its forward needs what cannot be made up.
    """
    name = type(model).__name__
    if hasattr(model, HOOK):
        return OwnBatches(model=model)
    takes = list(inspect.signature(type(model).forward).parameters.values())[1:]
    named = [one for one in takes if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if not named or named[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        raise MismatchError(_no_inputs(name, "its forward has no named argument"))
    labels = tuple(one.name for one in named[1:] if one.name in _LABELS)
    more = [one.name for one in named[1:] if one.default is one.empty and one.name not in labels]
    if more:
        raise MismatchError(_no_inputs(name, f"its forward needs {', '.join(more)} too"))
    ids = named[0].name
    tables = {id(one): one for one in model.modules() if isinstance(one, nn.Embedding)}
    off = tuple(one.name for one in named if one.name == "use_cache")
    batch = Batches(ids=ids, labels=labels, words=1, length=length, off=off)(0)
    tokens = batch.kwargs[ids]
    looked_up: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].data_ptr() == tokens.data_ptr():
            looked_up.append(module.num_embeddings)  # type: ignore[arg-type]

    handles = [table.register_forward_pre_hook(note) for table in tables.values()]
    try:
        with torch.no_grad():
            model(**batch.kwargs)
    except Exception as error:  # the user's code
        raise MismatchError(_no_inputs(name, f"with token ids as {ids}: {type(error).__name__}: {error}")) from None
    finally:
        for handle in handles:
            handle.remove()
    if not looked_up:
        raise MismatchError(_no_inputs(name, f"token ids given as {ids} are looked up in no nn.Embedding"))
    return Batches(ids=ids, labels=labels, words=min(looked_up), length=length, off=off)


def run(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and largest tensor of a forward of `model`, or of an engine around it.

    Raises:
        MismatchError: there is no tensor in its output.
    """
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    batch = batch.to(dtype)
    output = model(*batch.args, **batch.kwargs)
    tensors = [one for one in _tensors(output) if one.is_floating_point()]
    loss = next((one for one in tensors if one.dim() == 0), None)
    rest = [one for one in tensors if one.dim() > 0]
    main = max(rest, key=lambda one: one.numel(), default=None)
    if main is None:
        if loss is None:
            inside = getattr(model, "module", model)
            raise MismatchError(_no_output(type(inside).__name__, type(output).__name__))
        main = loss.reshape(1)
    if loss is None:
        weights = torch.linspace(-1, 1, main.numel(), dtype=main.dtype, device=main.device)
        loss = (main.flatten() * weights).mean()
    return loss, main


def settle(model: nn.Module, batches: Batches | OwnBatches) -> bool:
    """Leave a model in training mode if it computes the same twice there, without dropout, else in evaluation.

    Args:
        model: its dropout layers are given a probability of 0.
        batches: what it is run on.

    Returns:
        Whether it is in training mode.

    Raises:
        MismatchError: it computes something else each time, or numbers that are not finite, or its forward raises.
    """
    without_dropout(model)
    reasons = []
    for training in (True, False):
        model.train(training)
        reason = _differs(model, batches)
        if reason is None:
            return training
        reasons.append(reason)
    raise MismatchError(_not_a_function(type(model).__name__, reasons[-1]))


def without_dropout(model: nn.Module) -> None:
    """Give the dropout layers of a model a probability of 0."""
    for module in model.modules():
        if isinstance(module, _DROPOUT):
            module.p = 0.0


def _differs(model: nn.Module, batches: Batches | OwnBatches) -> str | None:
    """Why a model cannot be compared with another; None where it can."""
    try:
        with torch.no_grad():
            (first, main), (second, other) = run(model, batches(1)), run(model, batches(1))
            shapes = {run(model, batches(seed))[1].shape for seed in (2, 3, 4)}
    except MismatchError:
        raise
    except Exception as error:  # the user's code
        raise MismatchError(_no_inputs(type(model).__name__, f"{type(error).__name__}: {error}")) from None
    if main.shape != other.shape or not torch.equal(first, second) or not torch.equal(main, other):
        return "two forwards of the same inputs differ"
    if not bool(torch.isfinite(main).all()) or not bool(torch.isfinite(first)):
        return "its output is not finite"
    if shapes != {main.shape}:
        several = " and ".join(sorted({str([*shape]) for shape in (main.shape, *shapes)}))
        return f"the shape of its output depends on the values of its inputs: {several}"
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, those called `loss` and `logits` first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=lambda key: {"loss": 0, "logits": 1}.get(key, 2)):
            yield from _tensors(value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    else:
        yield from (one for name in ("loss", "logits") for one in _tensors(getattr(value, name, ())))


def _no_inputs(name: str, got: str) -> Fault:
    return Fault(
        code="no-example-inputs",
        what="there is nothing to run this model on",
        where=name,
        got=got,
        expected="a forward that runs on token ids as its first argument (and as labels or targets, if it takes those)",
        next=f"give {name} a method {HOOK}() that returns the arguments of a forward: a dict, a tuple, or a tensor; "
        "random numbers in it are drawn from torch's generator",
    )


def _bad_example(name: str, got: str) -> Fault:
    return Fault(
        code="bad-example-inputs",
        what="the model's example inputs are no arguments of a forward",
        where=f"{name}.{HOOK}",
        got=got,
        expected="a dict of arguments by name, a tuple of arguments, or a tensor",
        next="return one of them",
    )


def _no_output(name: str, got: str) -> Fault:
    return Fault(
        code="no-tensor-in-output",
        what="there is nothing to compare in the model's output",
        where=name,
        got=got,
        expected="a tensor; a tuple or dict of some; or an object with .loss and .logits",
        next="let --module name a function whose model returns one of them",
    )


def _not_a_function(name: str, got: str) -> Fault:
    return Fault(
        code="not-reproducible",
        what="this model cannot be compared with a sharded one",
        where=name,
        got=got,
        expected="a finite output that follows from inputs and weights alone, of a shape that no value changes",
        next="let --module name a function that makes it without its randomness and its counters",
    )
