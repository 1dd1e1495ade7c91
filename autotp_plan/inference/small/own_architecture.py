"""A model that is not from transformers, as inference sees it: the function that makes it in the place of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotp_plan.factories.example_batch import Batch, batches_for, run, settle
from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.factories.small_sizes import Changes, roles_of
from autotp_plan.huggingface.disk_names import NamesOnDisk
from autotp_plan.inference.small.resized import numbers_of
from autotp_plan.inference.small.small_model import SmallModel, randomise
from autotp_plan.probes.linear import is_linear
from autotp_plan.schemas.errors import AutoTPError, CompileError, Fault, OptionError
from autotp_plan.schemas.names import is_index

MOST_PARAMETERS = 4_000_000
_LENGTH = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnSmallModel(SmallModel):
    """A small model of a user's function in float64 with random weights. `config` are the function's arguments."""

    batch: Batch

    def run(self) -> Any:
        """A forward pass, with an attention that can be differentiated twice."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(*self.batch.args, **self.batch.kwargs)

    def bypassed(self) -> frozenset[str]:
        """The modules that run with gradients and are passed by without, as those of nn.TransformerEncoderLayer are."""
        ran: dict[bool, set[str]] = {True: set(), False: set()}

        def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                ran[torch.is_grad_enabled()].add(name)
                return forward(*args, **kwargs)

            return noted

        # no hooks: torch's layers are not passed by where there is one
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            module.forward = noting(name, module.forward)
        try:
            for enabled in ran:
                with torch.set_grad_enabled(enabled):
                    self.run()
        finally:
            for module in modules.values():
                del module.forward
        return frozenset(ran[True] - ran[False])

    def embedding_and_head(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The table that token ids are looked up in, and the linear layer that ends with as many features."""
        looked_up: list[nn.Embedding] = []
        ran: list[tuple[str, nn.Module]] = []
        ids = [one for one in self.batch.tensors if not one.is_floating_point()]

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Embedding)
            if args and isinstance(args[0], Tensor) and any(args[0].data_ptr() == one.data_ptr() for one in ids):
                looked_up.append(module)

        handles = [m.register_forward_pre_hook(note) for m in self.model.modules() if isinstance(m, nn.Embedding)]
        for name, module in self.model.named_modules():
            if is_linear(module) and not any(is_index(part) for part in name.split(".")):
                handles.append(module.register_forward_hook(lambda inside, *_, name=name: ran.append((name, inside))))
        try:
            with torch.no_grad():
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        embedding = looked_up[0] if looked_up and reads_alone(self, looked_up[0]) else None
        words = looked_up[0].weight.shape[0] if looked_up else None
        heads = [module for _, module in ran if getattr(module, "out_features", None) == words]
        head = heads[-1] if heads else None
        tied = head is not None and looked_up and head.weight is looked_up[0].weight
        return embedding, None if head is None or (tied and embedding is None) else head


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnArchitecture:
    """A user's function with its arguments, in the words of `Architecture`.

    Attributes:
        factory: the function.
        original: the model at its full size, on meta.
        config: the function's arguments.
        given: empty: no file gives any of them.
        computed, aliases: none.
        layers: None: which layers there are is not taken from the arguments.
    """

    factory: ModuleFactory
    original: Any
    config: dict[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    layers: int | None = None

    @classmethod
    def read(cls, factory: ModuleFactory) -> OwnArchitecture:
        """The architecture of a function.

        Raises:
            OptionError: it cannot be called.
        """
        config = factory.config()
        return cls(factory=factory, original=factory.on_meta(), config=config)

    @property
    def name(self) -> str:
        """The function."""
        return self.factory.name

    @property
    def model_types(self) -> list[str]:
        """None: plans of such models have no `model_type`."""
        return []

    @property
    def numbers(self) -> dict[str, int]:
        """Every positive integer of its arguments."""
        return dict(numbers_of(self.config))

    def disk_names(self) -> NamesOnDisk:
        """As in memory."""
        return NamesOnDisk({}, {}, {}, [])

    def value_without(self, config: Mapping[str, Any], key: str) -> int | None:
        """None: an argument that is left out has a default that no other decides."""
        return None

    def small(self, changes: Changes) -> OwnSmallModel:
        """A small model. Raises whatever the function or its forward does for sizes that do not go together."""
        elements = sum(one.numel() for one in self.factory.on_meta(changes).parameters())
        if elements > MOST_PARAMETERS:
            raise ValueError(
                f"a model of {elements} parameters is too large; give the sizes of a small one with --small"
            )
        torch.manual_seed(0)
        model = self.factory.make(changes).double()
        randomise(model)
        batches = batches_for(model, _LENGTH)
        settle(model, batches)
        model.eval()
        batch = batches(1).to(torch.float64)
        run(model, batch)
        config = {**self.config, **changes}
        tokens = next((one for one in batch.tensors if not one.is_floating_point()), torch.zeros(1, 1))
        return OwnSmallModel(model=model, config=config, numbers=dict(numbers_of(config)), tokens=tokens, batch=batch)

    def pairs(self) -> Iterator[tuple[OwnSmallModel, OwnSmallModel]]:
        """Pairs of small models that run, in the order in which they should be tried.

        The last pair is the model itself, twice, if it is small: then sizes are written as numbers.

        Raises:
            CompileError: at the end, if there was none.
        """
        tried: list[str] = []
        refused: list[Fault] = []
        found = False
        for changes, others in self._candidates():
            try:
                one, other = self.small(changes), self.small(others)
            except AutoTPError as error:
                refused = refused or list(error.faults)
                tried.append(f"{_shown(changes)}: {error.faults[0].got}")
                continue
            except Exception as error:  # the user's code, for sizes that do not go together
                tried.append(f"{_shown(changes)}: {type(error).__name__}: {error}")
                continue
            found = True
            yield one, (one if others is changes else other)
        if not found:
            last = [fault for fault in refused if fault.code != "factory-raised"]
            raise CompileError(last[0] if last else _no_small(self.factory.name, tried))

    def _candidates(self) -> Iterator[tuple[Changes, Changes]]:
        small = [dict(one) for one in self.factory.small]
        if len(small) > 1:
            yield small[0], small[1]
            return
        first = small[0] if small else {}
        try:
            pairs = list(roles_of(self.factory, first).pairs())
        except OptionError:
            pairs = []
        for one, other in pairs:
            yield (first, {**first, **other}) if small else (one, other)
        if not small:
            yield first, first


def reads_alone(small: SmallModel, table: Any) -> bool:
    """Whether nothing but the module itself, and modules that share its weight, computes with a weight."""
    from torch.overrides import TorchFunctionMode

    inside, outside = [0], [0]

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(one is table.weight for one in (*args, *(kwargs or {}).values())) and "__get__" not in str(func):
                (inside if depth[0] else outside)[0] += 1
            return func(*args, **(kwargs or {}))

    depth = [0]
    handles = []
    for module in small.model.modules():
        if getattr(module, "weight", None) is table.weight:
            handles.append(module.register_forward_pre_hook(lambda *_: depth.__setitem__(0, depth[0] + 1)))
            handles.append(module.register_forward_hook(lambda *_: depth.__setitem__(0, depth[0] - 1)))
    try:
        with torch.no_grad(), Count():
            small.run()
    finally:
        for handle in handles:
            handle.remove()
    return outside[0] == 0


def _shown(changes: Changes) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in changes.items()) or "the sizes as they are"


def _no_small(name: str, tried: list[str]) -> Fault:
    return Fault(
        code="no-small-module",
        what="no small model could be made and run, so nothing can be inferred",
        where=f"--module {name}",
        got="; ".join(dict.fromkeys((tried[0], tried[-1]))) if tried else "no sizes to try",
        expected="a model that its function makes smaller when it is given smaller sizes",
        next="give the sizes of a small model with --small '{...}', and those of another with a second --small",
    )
