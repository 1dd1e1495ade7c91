"""The class of a model from `load_model`: the model's own class, with other methods where a shard is not the model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from autotp_plan.huggingface.internals import mark_as_loaded
from autotp_plan.runtime.calls.adapters import AdapterMethods
from autotp_plan.runtime.calls.generation import GenerationCalls
from autotp_plan.runtime.calls.model_methods import ModelMethods
from autotp_plan.runtime.calls.vocabulary import VocabularyCalls
from autotp_plan.runtime.calls.wrappers import guard_wrappers
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas.plan.document import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """How a model was loaded, for the methods that a sharded model has instead of its class's.

    Attributes:
        plan: the plan it is sharded by.
        ranks: this process's place in the mesh.
        folder: the shards folder or checkpoint that its weights came from.
    """

    plan: Plan
    ranks: Ranks
    folder: Path

    def __deepcopy__(self, memo: Any) -> Loaded:
        return self  # never changed; and a process group cannot be copied


class ShardedModule:
    """Methods of every sharded model, before those of its class."""

    autotp: Loaded

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter itself, this rank's shard; a layer's attribute may show the full weight."""
        owner, _, leaf = target.rpartition(".")
        parameter = tensor_of(cast(nn.Module, self).get_submodule(owner), leaf)
        assert isinstance(parameter, nn.Parameter)
        return parameter


class ShardedPreTrainedModel(AdapterMethods, GenerationCalls, ModelMethods, VocabularyCalls, ShardedModule):
    """Methods of a sharded transformers model, before those of `PreTrainedModel`."""


def become_sharded(model: nn.Module, loaded: Loaded) -> None:
    """Give a sharded model its class, in place; with one TP rank nothing is sharded, and it keeps what it has.

    The class has the name and the module of the model's own, which transformers writes into config.json and looks up
    in its tables.

    Args:
        model: a model whose weights are loaded.
        loaded: how it was loaded; `model.autotp` from then on.
    """
    model.autotp = loaded  # type: ignore[assignment]
    mark_as_loaded(model)
    if loaded.ranks.tp_size > 1:
        cls: Any = type(model)
        model.__class__ = _sharded_class(cls)
        guard_wrappers()


def loaded_of(model: nn.Module) -> Loaded:
    """How a model from `load_model` was loaded."""
    loaded = model.autotp
    assert isinstance(loaded, Loaded)
    return loaded


@functools.cache
def _sharded_class(cls: Any) -> Any:
    methods = ShardedPreTrainedModel if issubclass(cls, PreTrainedModel) else ShardedModule

    def new(sharded: Any, *args: Any, **kwargs: Any) -> Any:
        """A new model, as `type(model).from_pretrained` makes one, is not sharded; without arguments it is a copy."""
        return cls(*args, **kwargs) if args or kwargs else object.__new__(sharded)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__new__": new}
    return type(cls.__name__, (methods, cls), names)
