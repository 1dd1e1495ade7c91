"""What training steps of one rank take, with DeepSpeed's own engine and optimizer, on tensors without data."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn

from autotp_plan.huggingface.internals import with_sequences_unpacked
from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.internals import skip_sums_over_one_rank
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.runtime.estimate.fake_internals import (
    engine_without_data,
    fused_attention,
)
from autotp_plan.runtime.estimate.fake_rank import fake_rank
from autotp_plan.runtime.estimate.step_watch import Seen
from autotp_plan.runtime.loading.activation_checkpointing import use_activation_checkpointing
from autotp_plan.runtime.optimizers.grad_norm import use_global_norm
from autotp_plan.runtime.tensor_parallel.gathered_weight import showing_shards
from autotp_plan.schemas.estimate.document import RankEstimate
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.plan.document import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MOST_RUN = 3
"""Forwards and backwards that are run of a step: the first, the last, and one for all between them."""


def engine_step(plan: Plan, tp_rank: int, settings: Settings, config: dict[str, Any] | None = None) -> RankEstimate:
    """Two training steps of one rank of a world that is not there. A process can do it once; see `fake_rank`.

    DeepSpeed's engine is made and steps as in a job. In the first step the optimizer makes its states; the second one
    is what every further step takes.

    Args:
        plan: of a transformers model.
        tp_rank: whose shards; it is the first data-parallel rank, which holds no less than the others.
        settings: how the plan is trained.
        config: a DeepSpeed config with further settings: buckets, gradient clipping.

    Raises:
        MismatchError: the plan has no config, or its model is not the one that transformers builds; or the config has a
            wrong value.
        CheckpointError: transformers cannot build the model.
    """
    model, ranks, mode = fake_rank(plan, tp_rank, settings.dp_size, DTYPES[settings.dtype], settings.loss_chunks)
    return run_engine(plan, model, ranks, mode, settings, config or {})


def run_engine(
    plan: Plan,
    model: Any,
    ranks: Ranks,
    mode: contextlib.AbstractContextManager[Any] | None,
    settings: Settings,
    config: dict[str, Any],
) -> RankEstimate:
    """As `engine_step`, of a model in training mode that is there.

    Args:
        plan: of the model.
        model: from `fake_rank`, or from `load_model`.
        ranks: this process's place in the mesh.
        mode: active while the model runs: what `fake_rank` returned; None for a model with data, in a job.
        settings: as for `engine_step`.
        config: as for `engine_step`.
    """
    if settings.recomputed is not None:
        use_activation_checkpointing(model, settings.recomputed)
    run = min(settings.gradient_accumulation_steps, _MOST_RUN)
    further = settings.gradient_accumulation_steps - run
    seen = Seen(model, ranks, "gradients and buckets" if settings.zero_stage else "gradients")
    gc.collect()
    gc.freeze()  # so that collecting what a layer left behind takes milliseconds
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(engine_without_data(model))
        stack.enter_context(seen.watch)
        if mode is not None and settings.device == "cuda":
            stack.enter_context(fused_attention())
        stack.enter_context(showing_shards())
        stack.enter_context(with_sequences_unpacked())
        engine = _engine(plan, model, ranks, settings, config, run)
        seen.made(engine)
        tokens = torch.zeros(settings.micro_batch_size, settings.seq_length, dtype=torch.long, device=ranks.device)
        for step in range(2):
            seen.steps = step
            for micro_step in range(run):
                seen.times = 1 + further * (micro_step == 1)
                with seen.phase("forward"):
                    loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
                with seen.phase("backward"):
                    engine.backward(loss)
                del loss
                with seen.phase("optimizer step"):  # which it is after the last of them
                    engine.step()
            assert engine.global_steps == step + 1, "the optimizer has stepped"
            seen.stepped(engine)
    return seen.estimate(ranks, settings)


def _engine(
    plan: Plan, model: nn.Module, ranks: Ranks, settings: Settings, config: dict[str, Any], micro_steps: int
) -> Any:
    """DeepSpeed's engine, with an optimizer whose step takes no memory but that of its states, as fused ones."""
    zero = dict(config.get("zero_optimization") or {})
    for offload in ("offload_optimizer", "offload_param"):
        zero.pop(offload, None)
    made = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler", "train_batch_size")}
    made |= {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": {**zero, "stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
    }
    for dtype in ("bf16", "fp16"):
        section = dict(config.get(dtype) or {})
        made[dtype] = {**section, "enabled": settings.dtype == dtype}
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = _OPTIMIZERS[settings.optimizer](parameters)
    use_global_norm()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(made, plan), mpu=groups)
    check = getattr(engine, "first_dataloader_check", None)
    if check is not None:  # of the first batch, over ranks that are not there
        check.remove()
        engine.first_dataloader_check = None
    skip_sums_over_one_rank(engine)
    return engine


_OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda given: torch.optim.AdamW(given, fused=True),
    "adam": lambda given: torch.optim.Adam(given, fused=True),
    "sgd": lambda given: torch.optim.SGD(given, fused=True),
    "momentum": lambda given: torch.optim.SGD(given, momentum=0.9, fused=True),
    "lion": lambda given: torch.optim.SGD(given, momentum=0.9, fused=True),  # one tensor of a weight's size, too
}
