"""Losses, gradients and their norm in the dtypes that models are trained in, beside the unsharded model's.

How large an error may be is measured, not chosen: in the same run the unsharded model is computed in that dtype and in
a more exact one. The error of a sharded number, divided by the error that the unsharded one has in the same dtype, is
near 1 when nothing but rounding differs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.work import Error, Found, Work, batches, dense, sharded, spoiled

FAMILIES: dict[str, dict[str, Any]] = {
    "llama_bias_tied": {}, "qwen3": {}, "gemma2": {}, "gpt_neox": {}, "falcon_multi_query": {},
    "mixtral": {"num_experts_per_tok": 4},
}  # fmt: skip
"""Changes of their configs. Every expert of Mixtral sees each token: rounding may choose another expert, which is no
error of a gradient. `float64` compares the choice."""
EXACT = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
"""What the errors of a dtype are measured against."""
LIMIT = 4.0
"""Sharded errors of at most so many times the unsharded ones: with 6 batches of each family on CPU they were at most
1.9 times in float32 and 2.4 times in bfloat16."""
_FLOOR = {torch.bfloat16: 2**-8, torch.float32: 2**-22}
"""A number of which the unsharded model is right by chance counts as rounded so: bfloat16's last digit, in which norms
are computed too, and the last two of float32."""
_PLANTED = {torch.bfloat16: 0.1, torch.float32: 0.01}
"""In bfloat16 a gradient is rounded to a hundredth of itself: an error of a hundredth does not stand out."""
Kinds = dict[str, dict[str, float]]


def parity(
    variant: str,
    dtype: torch.dtype,
    work: Work,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    planned: dict[str, Any] | None = None,
    **options: Any,
) -> Found:
    """Losses, logits, every gradient and their norm of two passes in bfloat16 or float32.

    Args:
        variant: a family.
        dtype: of the sharded model and the unsharded one.
        work: where.
        within: a context for both, such as one that chooses a kernel.
        planned: arguments of `compile_plan`.
        **options: for `from_pretrained` of both, such as `attn_implementation`; the exact model has none.
    """
    from tests.helpers.models import eager_experts

    changes = FAMILIES.get(variant, {})
    exact = dense(work, variant, EXACT[dtype], changes=changes, **eager_experts(EXACT[dtype]))
    with within():
        rounded = dense(work, variant, dtype, changes=changes, **options)
        plan, model = sharded(work, variant, changes=changes, planned=planned, dtype=dtype, **options)
    return compare_with(work, plan, model, exact=exact, rounded=rounded, within=within)


def compare_with(
    work: Work,
    plan: Any,
    model: Any,
    *,
    exact: Any,
    rounded: Any,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Found:
    """The errors of a sharded model, in units of those of an unsharded one in the same dtype.

    Args:
        work: where.
        plan: the TrainingPlan of `model`.
        model: the sharded model, in training mode.
        exact: the unsharded model in the dtype that errors are measured against.
        rounded: the unsharded model in the dtype of `model`.
        within: a context for the passes of `rounded` and `model`.
    """
    from autotp_plan.runtime.verify import compare
    from autotp_plan.runtime.verify.float64_passes import dense_reader, shard_reader

    dtype = next(rounded.parameters()).dtype
    names = [name for name, _ in exact.named_parameters()]
    expected = _passes(work, exact, dense_reader(exact), names)
    with within():
        of_rounded = _passes(work, rounded, dense_reader(rounded), names)
        found = _passes(work, model, shard_reader(model), names)
    unsharded = {
        kind: {name: share(value, of_rounded[kind][name]) for name, value in of.items()}
        for kind, of in expected.items()
    }
    allowed = _floored(unsharded, _FLOOR[dtype])

    def errors(numbers: Any) -> Kinds:
        return compare.errors(expected, numbers, plan.document, plan.ranks.tp_rank, share)

    def ratio(of_sharded: Kinds) -> float:
        return max(error / allowed[kind][name] for kind, of in of_sharded.items() for name, error in of.items())

    wrong = {**found, "gradient": spoiled(found["gradient"], min(found["gradient"]), _PLANTED[dtype])}
    of_sharded = errors(found)
    figures = {
        kind: f"{max(of.values()):.1e} (unsharded {max(unsharded[kind].values()):.1e})"
        for kind, of in of_sharded.items()
    }
    return Error(worst=ratio(of_sharded), planted=ratio(errors(wrong))).found(**figures)


def share(expected: Tensor, found: Tensor) -> float:
    """The norm of the difference of two tensors, as a share of what was expected; infinite if it is not a number."""
    if expected.shape != found.shape:
        return math.inf
    difference = (found.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm else difference


def _floored(errors: Kinds, floor: float) -> Kinds:
    """The errors, none below the median of its kind nor below `floor`."""
    return {
        kind: {name: max(error, statistics.median(of.values()), floor) for name, error in of.items()}
        for kind, of in errors.items()
    }


def _passes(work: Work, model: Any, read: Callable[..., Any], names: list[str]) -> Any:
    """As `run_passes`, with the norm of the gradients after both."""
    from autotp_plan.runtime.verify.float64_passes import causal_lm, run_passes

    promote = next(model.parameters()).dtype == torch.float64
    numbers = run_passes(model, read, names, batches(work), forward=causal_lm, promote=promote)
    gradients = [value for value in model.parameters() if value.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(gradients, math.inf)
    return {**numbers, "gradient norm": {"both passes": norm.detach().reshape(1)}}
