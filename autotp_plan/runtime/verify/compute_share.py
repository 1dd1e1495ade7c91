"""What a forward of a model computes: how much of the dense model's arithmetic a rank still has.

A plan that gathers and lets every rank compute everything is right and no faster than one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from autotp_plan.runtime.verify.float64_passes import BatchOf, Forward, PromoteToFloat64, by_class
from autotp_plan.runtime.verify.report import Pass


def forward_operations(model: Any, batches: BatchOf, forward: Forward = by_class) -> int:
    """Floating-point operations of a forward in float64: of matrix products, convolutions and attention.

    Element-wise operations do not count, as in `torch.utils.flop_counter`.

    Args:
        model: dense, or one rank's part of it; then every rank must call this.
        batches: the first of them is the input.
        forward: gives loss and logits.

    Returns:
        Two for each multiplication and addition.
    """
    # with gradients: the counter's hooks need the gradient function of a part of a weight that a module is given
    with torch.enable_grad(), PromoteToFloat64(), FlopCounterMode(display=False) as counter:
        forward(model, batches(Pass.FIRST.seed))
    return int(counter.get_total_flops())
