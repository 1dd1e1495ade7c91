"""Calls that change a model's vocabulary, its embeddings or its ties.

The plan says how many tokens there are and which rank holds which. So these calls do nothing where they change nothing,
and are refused where they would make another model than the plan's.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from autotp_plan.runtime.loading.shard_model import restore_ties
from autotp_plan.schemas.errors import Fault, MismatchError


class VocabularyCalls:
    """Methods of `PreTrainedModel` that would see one rank's tokens as the vocabulary."""

    autotp: Any
    get_input_embeddings: Any
    get_output_embeddings: Any

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """The input embeddings, when the vocabulary has the wanted size already.

        Args:
            new_num_tokens: the number of tokens; None for that of the model.
            pad_to_multiple_of: the number of tokens is rounded up to a multiple of it.
            mean_resizing: as in transformers; without effect.

        Returns:
            This rank's part of the input embeddings.

        Raises:
            MismatchError: the vocabulary has another size.
        """
        embeddings: Any = self.get_input_embeddings()
        size: int = embeddings.num_embeddings
        wanted = size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != size:
            enough = "leave out the call if the vocabulary need only be large enough; else " if wanted < size else ""
            raise MismatchError(
                Fault(
                    what="the vocabulary of a sharded model cannot be resized",
                    where="model.resize_token_embeddings",
                    got=f"{wanted} tokens",
                    expected=f"{size} tokens, as in the plan",
                    next=f"{enough}resize before compile: AutoModelForCausalLM.from_pretrained(path), "
                    f"resize_token_embeddings({wanted}), save_pretrained(folder), then compile a plan of that folder",
                )
            )
        return embeddings  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused, unless `value` is what the model has."""
        if value is not self.get_input_embeddings():
            refuse_replacement("the embeddings", "set_input_embeddings", value)

    def set_output_embeddings(self, new_embeddings: nn.Module | None) -> None:
        """Refused, unless `new_embeddings` is what the model has."""
        if new_embeddings is not self.get_output_embeddings():
            refuse_replacement("the embeddings", "set_output_embeddings", new_embeddings)

    def tie_weights(self, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
        """Tie what the plan ties, whatever the config says."""
        restore_ties(self, self.autotp.plan)  # type: ignore[arg-type]


def refuse_replacement(parts: str, method: str, value: Any) -> NoReturn:
    """Raise MismatchError for another module in the place of `parts` of a sharded model."""
    raise MismatchError(
        Fault(
            what=f"{parts} of a sharded model cannot be replaced",
            where=f"model.{method}",
            got=type(value).__name__,
            expected="the module that the model has",
            next=f"replace them before compile: call {method} on the model of from_pretrained(path), "
            "save_pretrained(folder), then compile a plan of that folder",
        )
    )
