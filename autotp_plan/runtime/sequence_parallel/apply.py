"""Sequence parallelism of a model, as its plan says. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.sequence_parallel.lazy_sum import LazilySummed
from autotp_plan.runtime.sequence_parallel.modules import (
    EndOfStream,
    GatherInput,
    SplitOutput,
    StreamLayer,
    StreamModel,
    become,
    has_forward,
)
from autotp_plan.runtime.sequence_parallel.stream import Stream
from autotp_plan.runtime.tensor_parallel.embedding import VocabParallelEmbedding
from autotp_plan.runtime.tensor_parallel.linear import PlannedLayer, RowParallelLinear
from autotp_plan.schemas.names import expand
from autotp_plan.schemas.plan.document import Plan


def shard_sequence(model: nn.Module, plan: Plan, ranks: Ranks) -> None:
    """Let the layers of `model` hold this rank's tokens between them, in place.

    Args:
        model: a model whose modules were replaced by the plan's.
        plan: its plan.
        ranks: this process's place in the mesh.
    """
    planned = plan.sequence_parallel
    if planned is None or plan.tp_size == 1:
        return
    stream = Stream(ranks.tp_group, ranks.tp_rank, ranks.tp_size)
    for name in _names(planned.scatter):
        module = model.get_submodule(name)
        if isinstance(module, RowParallelLinear):
            module.stream = stream
        else:
            become(module, SplitOutput, stream, name)
    for name in _names(planned.gather):
        module = model.get_submodule(name)
        are_parallel = all(isinstance(child, PlannedLayer) for child in _with_parameters(module))
        become(module, GatherInput, stream, name)
        module.tp_may_wait = are_parallel  # type: ignore[assignment]
    layers = _names(planned.layers)
    around = _caller(model, layers[0])
    _defer_sum(model.get_submodule(around), [model.get_submodule(name) for name in (layers[0], planned.end)])
    become(model.get_submodule(around), StreamModel, stream, around)
    for position, name in enumerate(layers):
        layer = model.get_submodule(name)
        become(layer, StreamLayer, stream, name)
        layer.tp_is_first = position == 0  # type: ignore[assignment]
    become(model.get_submodule(planned.end), EndOfStream, stream, planned.end)


def _defer_sum(around: nn.Module, of_stream: Sequence[nn.Module]) -> None:
    """Let an embedding defer its sum to the first layer, where no module with parameters comes between.

    Code in Python may use a deferred sum as any tensor; the kernels of a module may not.

    Args:
        around: the module that calls the layers.
        of_stream: the first layer, and the last module of the stream.
    """
    embeddings = []
    for child in _with_parameters(around):
        if type(child) is VocabParallelEmbedding:  # a class of its own may do more than look up
            embeddings.append(child)
        elif not any(one in of_stream for one in child.modules()):
            return
    for embedding in embeddings:
        embedding.defer_sum = LazilySummed.of


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    """The children of a module that hold parameters."""
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _caller(model: nn.Module, layer: str) -> str:
    """The module that calls a layer: the one around it that has a forward, unlike a list."""
    name = layer.rpartition(".")[0]
    while name and not has_forward(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _names(patterns: tuple[str, ...]) -> list[str]:
    return [name for pattern in patterns for name in expand(pattern)]
