"""How a model was loaded: what the methods that a sharded model has instead of its class's know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from autotp_plan.runtime.data.batch_check import CompareBatch
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.origin import Original
from autotp_plan.sources.model_folder import ModelFolder


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """How a model was loaded, for the methods that a sharded model has instead of its class's.

    Attributes:
        plan: the plan it is sharded by.
        ranks: this process's place in the mesh.
        place: the shards folder or checkpoint that its weights came from.
        original: what a shards folder held besides the weights, on the first rank in files that stay open; None of a
            checkpoint.
        compare_batch: called at the begin of every forward; None where no batches are compared.
    """

    plan: Plan
    ranks: Ranks
    place: ModelFolder
    original: Original | None = None
    compare_batch: CompareBatch | None = None

    @property
    def source(self) -> Original | ModelFolder:
        """What a save takes from where the model came from: of shards, it need not be there any more."""
        return self.original or self.place

    def __deepcopy__(self, memo: Any) -> Loaded:
        return self  # never changed; and a process group cannot be copied


def loaded_of(model: nn.Module) -> Loaded:
    """How a model from `load_model` was loaded."""
    loaded = model.autotp
    assert isinstance(loaded, Loaded)
    return loaded
