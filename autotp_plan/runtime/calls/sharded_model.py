"""The class of a model from `load_model`: the model's own class, with other methods where a shard is not the model."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from autotp_plan.huggingface.internals import mark_as_loaded
from autotp_plan.runtime.calls.adapters import AdapterMethods
from autotp_plan.runtime.calls.generation import GenerationCalls
from autotp_plan.runtime.calls.loaded import Loaded
from autotp_plan.runtime.calls.model_methods import ModelMethods
from autotp_plan.runtime.calls.saving import SavesPretrained
from autotp_plan.runtime.calls.vocabulary import VocabularyCalls
from autotp_plan.runtime.calls.wrappers import guard_wrappers
from autotp_plan.runtime.deepspeed.zero_internals import is_managed_by_zero3
from autotp_plan.runtime.loading.shard_model import sum_partial_gradients
from autotp_plan.runtime.parameters.state_dicts import NotPickled
from autotp_plan.runtime.tensor_parallel.torch_internals import tensor_of
from autotp_plan.schemas.errors import Fault, MismatchError


class ShardedModule(NotPickled):
    """Methods of every sharded model, before those of its class."""

    autotp: Loaded

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter itself, this rank's shard; a layer's attribute may show the full weight."""
        owner, _, leaf = target.rpartition(".")
        parameter = tensor_of(cast(nn.Module, self).get_submodule(owner), leaf)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that trains as this one does.

        Raises:
            MismatchError: ZeRO 3 has partitioned the weights, of which a copy would know nothing.
        """
        if any(map(is_managed_by_zero3, cast(nn.Module, self).parameters())):
            raise MismatchError(
                Fault(
                    what="a model whose weights ZeRO 3 has partitioned cannot be copied",
                    where="copy.deepcopy(model)",
                    got="a model of an engine with ZeRO 3",
                    expected="a model before plan.initialize, or of an engine with ZeRO 0, 1 or 2",
                    next="plan.load_model(path) for a second model; engine.module.save_pretrained(folder) first, "
                    "where it is to have the trained weights",
                )
            )
        new: Any = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        sum_partial_gradients(new, self.autotp.plan, self.autotp.ranks.tp_group)
        return new


class ShardedPreTrainedModel(
    SavesPretrained, AdapterMethods, GenerationCalls, ModelMethods, VocabularyCalls, ShardedModule
):
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


@functools.cache
def _sharded_class(cls: Any) -> Any:
    methods = ShardedPreTrainedModel if issubclass(cls, PreTrainedModel) else ShardedModule

    def new(sharded: Any, *args: Any, **kwargs: Any) -> Any:
        """A new model, as `type(model).from_pretrained` makes one, is not sharded; without arguments it is a copy."""
        return cls(*args, **kwargs) if args or kwargs else object.__new__(sharded)

    @functools.wraps(cls.forward)  # Trainer and PEFT look at its signature
    def forward(sharded: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, after its batch was compared: in a hook it would not be, by `model.forward(...)`."""
        if sharded.autotp.compare_batch is not None:
            sharded.autotp.compare_batch(sharded.training, args, kwargs)
        return cls.forward(sharded, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__new__": new, "forward": forward}
    return type(cls.__name__, (methods, cls), names)
