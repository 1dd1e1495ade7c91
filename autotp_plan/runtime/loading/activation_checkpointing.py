"""Which activations a loaded model keeps for its backward: all, few, or the inputs of its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from autotp_plan.runtime.tensor_parallel.kept_results import selective_checkpointing
from autotp_plan.schemas.errors import Fault, MismatchError, OptionError

KINDS = ("full", "selective")


def check_activation_checkpointing(kind: str | None, model: nn.Module) -> None:
    """Check that a model can be trained so.

    Raises:
        OptionError: there is no such kind.
        MismatchError: the model does not know activation checkpointing.
    """
    where = f"load_model(activation_checkpointing={kind!r})"
    if kind is not None and kind not in KINDS:
        raise OptionError(
            Fault(
                code="activation-checkpointing",
                what="there is no such activation checkpointing",
                where=where,
                got=repr(kind),
                expected="None, " + " or ".join(map(repr, KINDS)),
                next='give "selective" to compute again what is cheap, "full" for everything between inputs of layers',
            )
        )
    if kind is not None and not getattr(model, "supports_gradient_checkpointing", False):
        raise MismatchError(
            Fault(
                code="no-activation-checkpointing",
                what="this model does not know activation checkpointing",
                where=where,
                got=type(model).__name__,
                expected="a transformers model whose supports_gradient_checkpointing is true",
                next="leave the argument out; call torch.utils.checkpoint.checkpoint in the model's own code, with "
                "use_reentrant=False and context_fn=autotp_plan.runtime.selective_checkpointing",
            )
        )


def use_activation_checkpointing(model: Any, kind: str) -> None:
    """Let a transformers model compute activations again in the backward: `full` all, `selective` those that are cheap.

    Args:
        model: a transformers model that knows activation checkpointing.
        kind: one of `KINDS`.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = selective_checkpointing
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
