"""The most that a rank holds, from a forward and backward without optimizer and from what ZeRO's stage adds. No torch.

The parts that ranks share are those of Rajbhandari et al., ZeRO (2020), section 5; buckets and copies are those of
DeepSpeed's engine for bf16 weights with its default settings. What is found is near what a run of the engine says, not
equal to it: it is for choosing what to run.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotp_plan.schemas.estimate.settings import OPTIMIZERS, Settings
from autotp_plan.schemas.estimate.step import Step

BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size` and of the buckets of stage 0, if not given."""
MAX_LIVE = 1_000_000_000
"""Elements of `stage3_max_live_parameters`, if not given: of gathered weights that are there at a time."""
_BF16, _FLOAT32 = 2, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a rank holds, in bytes.

    Attributes:
        states: weights, gradients, master weights and optimizer states that it holds all the time.
        forward: the most in the forward.
        backward: the most in the backward.
        optimizer_step: the most in the optimizer's step.
        initialize: the most while the engine is made: the weights before they are shared out, and their copy.
    """

    initialize: int
    states: int
    forward: int
    backward: int
    optimizer_step: int

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.initialize, self.forward, self.backward, self.optimizer_step)


def held_all_the_time(elements: int, settings: Settings) -> int:
    """Bytes of the weights, master weights and optimizer states of a rank with bf16 weights, without what is offloaded.

    Args:
        elements: of the weights of the TP rank.
        settings: how they are trained.
    """
    part = -(-elements // settings.dp_size)
    stepped = part if settings.zero_stage >= 1 else elements
    weights = part if settings.zero_stage == 3 else elements
    return _BF16 * weights + (0 if settings.offload == "optimizer" else stepped * bytes_stepped(settings))


def bytes_stepped(settings: Settings) -> int:
    """Bytes of the master weight and the optimizer's states of an element."""
    return _FLOAT32 * (1 + OPTIMIZERS[settings.optimizer])


def held(
    step: Step, elements: int, settings: Settings, bucket_elements: int = BUCKET, most_live: int = MAX_LIVE
) -> Held:
    """What a rank holds in a training step.

    Args:
        step: a forward and backward of the micro-batch of `settings`.
        elements: of the weights of the rank.
        settings: how they are trained: bf16 weights.
        bucket_elements: of the buckets in which gradients are reduced.
        most_live: elements of gathered weights at stage 3.
    """
    base = held_all_the_time(elements, settings) + step.buffers
    part, gradients = -(-elements // settings.dp_size), _BF16 * elements
    accumulates = settings.gradient_accumulation_steps > 1
    before = [0, *(total for total, _ in step.backward)]
    alive = [amount for _, amount in step.backward]
    bucket = _BF16 * bucket_elements
    made = gradients + _BF16 * (part if settings.zero_stage == 3 else elements) if settings.zero_stage else base
    if settings.zero_stage == 0:
        kept = gradients if accumulates else 0
        growing = max((amount + (kept or total) for amount, total in zip(alive, before)), default=0)
        reduced = gradients + min(bucket, gradients) if settings.dp_size > 1 else gradients
        return _held(made, base, kept + step.forward_peak, max(growing, reduced), gradients + _FLOAT32 * elements)
    if settings.zero_stage == 3:
        there = _BF16 * part + bucket + min(gradients, _BF16 * most_live)
        return _held(
            made, base, there + step.forward_peak, there + step.backward_peak, (2 * _BF16 + _FLOAT32) * part + bucket
        )
    kept = 0 if not accumulates else gradients + bucket if settings.zero_stage == 1 else _BF16 * part
    first = kept + alive[0] if alive else kept
    if settings.zero_stage == 1:
        later = (amount + (kept or bucket + total) for amount, total in zip(alive[1:], before[1:]))
    else:
        own = gradients - _BF16 * part  # the first rank's part has the first layers, whose gradients come last
        later = (bucket + amount + (kept or max(0, total - own)) for amount, total in zip(alive[1:], before[1:]))
    stepping = max((2 * _BF16 + _FLOAT32) * part, kept)
    return _held(made, base, kept + step.forward_peak, max(first, *later, 0), stepping)


def _held(made: int, base: int, forward: int, backward: int, optimizer_step: int) -> Held:
    return Held(
        initialize=made,
        states=base,
        forward=base + forward,
        backward=base + backward,
        optimizer_step=base + optimizer_step,
    )
