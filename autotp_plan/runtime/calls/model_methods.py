"""Methods of a sharded transformers model that would count, replace or run what one rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn

from autotp_plan.runtime.calls.vocabulary import refuse_replacement
from autotp_plan.runtime.deepspeed.zero_internals import full_shape
from autotp_plan.runtime.loading.local_shard import shards_of
from autotp_plan.schemas.errors import Fault, MismatchError

_RESHARD = "plan.load_model(path) alone; AutoModelForCausalLM.from_pretrained(path, ...) for a model without a plan"


class ModelMethods:
    """Methods of `PreTrainedModel`."""

    get_encoder: Any
    get_decoder: Any

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of the model that is not sharded. No communication.

        Args:
            only_trainable: count those that require a gradient.
            exclude_embeddings: leave out the weights of embeddings.

        Returns:
            The same number on every rank.
        """
        sizes: list[int] = [
            size
            for module, leaf, parameter, size in full_sizes(self)  # type: ignore[arg-type]
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and isinstance(module, nn.Embedding) and leaf == "weight")
        ]
        return sum(sizes)

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """Refused, unless `encoder` is what the model has."""
        if encoder is not self.get_encoder(modality):
            refuse_replacement("the encoder and decoder", "set_encoder", encoder)

    def set_decoder(self, decoder: nn.Module) -> None:
        """Refused, unless `decoder` is what the model has."""
        if decoder is not self.get_decoder():
            refuse_replacement("the encoder and decoder", "set_decoder", decoder)

    def set_use_kernels(self, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        """Refused, unless `use_kernels` is false: a kernel in the place of a module's forward has no collectives."""
        if use_kernels:
            raise MismatchError(
                Fault(
                    what="kernels of the Hub cannot replace modules of a sharded model",
                    where="model.set_use_kernels, model.use_kernels",
                    got="True",
                    expected="False: such a kernel computes with one rank's shards and makes no all-reduce",
                    next='leave it out; model.set_attn_implementation("sdpa") takes a fused attention',
                )
            )

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as the other ways to continuous batching."""
        _refuse_continuous_batching("generate_batch")

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        _refuse_continuous_batching("init_continuous_batching")

    def continuous_batching_context_manager(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        _refuse_continuous_batching("continuous_batching_context_manager")

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh_manager: Any) -> nn.Module:
        """As transformers', for a model that is not sharded."""
        if mesh_manager is not None and isinstance(model, ModelMethods):
            raise MismatchError(
                Fault(
                    what="a sharded model cannot be sharded once more by transformers",
                    where="maybe_distribute_model",
                    got=type(distributed_config).__name__,
                    expected="the plan alone",
                    next=_RESHARD,
                )
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc,no-any-return]


def full_sizes(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, int]]:
    """Each parameter of the model without sharding, once: its module, name there, what holds it here, its elements."""
    seen = set()
    for module in model.modules():
        shards = shards_of(module)
        held = {one.name: name for name, parts in shards.held.items() for one in parts} if shards is not None else {}
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = held.get(leaf, leaf)
            if name == leaf:  # and not the second part of one that is held in two
                shape = shards.shapes[leaf] if shards is not None and leaf in held else full_shape(parameter)
                yield module, leaf, parameter, math.prod(shape)


def _refuse_continuous_batching(method: str) -> NoReturn:
    raise MismatchError(
        Fault(
            what="a sharded model has no continuous batching",
            where=f"model.{method}",
            got="a scheduler on each rank, which chooses its batches by itself",
            expected="the same batches on all ranks of a TP group",
            next="model.generate(...) with a batch of prompts, on every rank",
        )
    )
