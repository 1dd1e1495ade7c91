"""Adapters by transformers' own methods, which know nothing of shards."""

from __future__ import annotations

from typing import Any, NoReturn

from autotp_plan.schemas.errors import Fault, MismatchError


class AdapterMethods:
    """`add_adapter` and `load_adapter` of a sharded transformers model."""

    def add_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the adapter must be sharded like its layers, and be saved by the plan."""
        raise _refusal("model.add_adapter", "model = plan.add_lora(model, config)")

    def load_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: each rank must take its shard of the adapter."""
        raise _refusal("model.load_adapter", "model = plan.load_adapter(model, folder)")


def _refusal(where: str, instead: str) -> MismatchError:
    return MismatchError(
        Fault(
            what="transformers cannot give a sharded model an adapter",
            where=where,
            got="a model from plan.load_model",
            expected="the plan's way to an adapter, which PEFT then runs",
            next=instead,
        )
    )
