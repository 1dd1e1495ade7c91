"""A forward and backward of one rank as it was seen, without optimizer and ZeRO: what they add is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from autotp_plan.schemas.plan.document import Plan


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What is to be run for a `Step`.

    Attributes:
        plan: of a transformers model.
        tp_rank: whose shards.
        sequences: that the rank is given.
        length: tokens of each.
        activation_checkpointing: `full`, `selective` or None, as `load_model` is given it.
    """

    plan: Plan
    tp_rank: int
    sequences: int
    length: int
    activation_checkpointing: str | None


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Collective:
    """Collectives of one kind in one step.

    Attributes:
        operation: as torch.distributed calls it: `allreduce_`, `_allgather_base_`.
        group: `tensor` or `data`.
        tensor_bytes: of the tensor that each of them sums or puts together.
        count: how many there are.
    """

    operation: str
    group: str
    tensor_bytes: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A forward and backward of one rank. All sizes are in bytes.

    Attributes:
        parameters: of the weights that the rank holds.
        buffers: of the model's buffers.
        kept: what the forward leaves for the backward.
        forward_peak: most that was alive in the forward, beside parameters and buffers.
        backward: for each gradient, in the order in which they are made: the bytes of all gradients so far, and the
            most that was alive since the one before, beside parameters, buffers and gradients.
        forward_operations: floating-point operations of matrix products, convolutions and attention.
        backward_operations: those of the backward, recomputation included.
        collectives: of forward and backward.
    """

    parameters: int
    buffers: int
    kept: int
    forward_peak: int
    backward: tuple[tuple[int, int], ...]
    forward_operations: int
    backward_operations: int
    collectives: tuple[Collective, ...]

    @property
    def backward_peak(self) -> int:
        """Most that was alive in the backward, beside parameters, buffers and gradients."""
        return max((alive for _, alive in self.backward), default=0)
