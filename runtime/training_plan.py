"""`load_plan`, and what its plan can do: load this rank's model, start a DeepSpeed engine, feed it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import init_empty_weights
from deepspeed.utils import groups, log_dist
from torch import nn

from autotp_plan.runtime.checkpoint.job import load_checkpoint, save_checkpoint
from autotp_plan.runtime.checkpoint.mesh_change import why_not
from autotp_plan.runtime.checkpoint.save_shards import save_shards
from autotp_plan.runtime.data.batches import ResumableSampler, check_batches, tp_sampler
from autotp_plan.runtime.deepspeed.autotp_calls import check_old_calls
from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.mesh import Ranks, check_world_size, init_ranks
from autotp_plan.runtime.loading.check_model import check_model
from autotp_plan.runtime.loading.meta_model import build_model
from autotp_plan.runtime.loading.shard_model import shard_model
from autotp_plan.runtime.loading.weights import open_weights
from autotp_plan.schemas.plan.document import Plan


def load_plan(path: str | os.PathLike[str]) -> TrainingPlan:
    """The plan in the file `path`. Raises DocumentError with every fault found."""
    return TrainingPlan(Plan.read(Path(path)))


@dataclass(frozen=True)
class TrainingPlan:
    """A plan at work in one process. `document` is the plan as it was read."""

    document: Plan

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.document.tp_size

    @property
    def ranks(self) -> Ranks:
        """TP and DP ranks, groups and device of this process; initialises them where the caller has not."""
        return init_ranks(self.tp_size)

    def load_model(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Callable[[], nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        verify_checksums: bool = False,
        map_shards: bool = True,
        share_input_gradients: bool = True,
        vocab_parallel_loss: bool = True,
        **options: Any,
    ) -> nn.Module:
        """This rank's part of the model, ready for `initialize`.

        Args:
            path: a shards folder, or the original checkpoint (then only this rank's intervals are read).
            model: a module of your own, built on meta, or a function that builds it; None builds the transformers
                model that the folder's config.json describes.
            dtype: floating-point dtype to convert to; None keeps the checkpoint's (or what the plan says).
            verify_checksums: read every shard file once more and compare its checksum (sizes, headers and fingerprints
                are always compared).
            map_shards: a pre-split weight that stays on the CPU in its dtype is a page of its file until it is written
                to. False reads it at once, for a folder that is gone or slow while the job trains.
            share_input_gradients: sum the gradient of a tensor over the ranks once, not once for each of the layers
                that take it (q, k and v; gate and up). With `tp_overlap_comm` each layer sums its own.
            vocab_parallel_loss: in training with labels, a transformers causal LM computes its loss from each rank's
                part of the logits. `output.logits` are then gathered when they are used, which every rank of the TP
                group must do; without labels, or in evaluation, they are gathered at once.
            options: for transformers, such as `attn_implementation`.

        Every mismatch between plan, folder, model and world size raises before any communication, on every rank alike:
        MismatchError, ShardsError, CheckpointError or DocumentError. The model's first forward in training, and in
        evaluation, raises MismatchError when the TP ranks were given different batches.
        """
        check_world_size(self.tp_size)
        source = open_weights(Path(path), self.document, verify_checksums=verify_checksums, map_shards=map_shards)
        if model is None:
            built = build_model(Path(path), self.document, **options)
        elif isinstance(model, nn.Module):
            built = model
        else:
            with init_empty_weights(include_buffers=False):
                built = model()
        check_model(built, self.document)
        if dtype is None and self.document.runtime.dtype is not None:
            dtype = getattr(torch, self.document.runtime.dtype)
        shard_model(
            built,
            self.document,
            source,
            self.ranks,
            dtype,
            share_input_gradients=share_input_gradients,
            vocab_parallel_loss=vocab_parallel_loss,
        )
        if self.tp_size > 1:
            check_batches(built, self.ranks)
        built.autotp_loaded_from = Path(path).absolute()  # type: ignore[assignment]
        return built

    def initialize(
        self,
        model: nn.Module,
        *,
        config: str | os.PathLike[str] | dict[str, Any],
        training_data: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        seed: int = 0,
        skip_lone_sums: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """`deepspeed.initialize` for a model from `load_model`: `(engine, optimizer, loader, scheduler)`.

        `config` is a DeepSpeed config file or dict; its batch sizes count data-parallel ranks, and its
        `tensor_parallel` section, where it has one, must be of the plan's TP size. `kwargs` go to
        `deepspeed.initialize` unchanged. The loader gives all TP ranks of a data-parallel group the same batches, in an
        order that `seed` and the epoch decide. With `skip_lone_sums` and one DP rank, without ZeRO, gradients are not
        copied for DeepSpeed's sum over that rank. An `mpu` of an older script is compared with the plan's ranks and not
        used. Raises MismatchError.
        """
        settings = engine_config(config, self.document)
        ranks = self.ranks
        check_old_calls(kwargs.pop("mpu", None), ranks)
        if kwargs.get("model_parameters") is None:
            kwargs["model_parameters"] = [p for p in model.parameters() if p.requires_grad]
        engine, optimizer, _, scheduler = deepspeed.initialize(model=model, config=settings, mpu=groups, **kwargs)
        if skip_lone_sums:
            _skip_lone_sums(engine)
        if reason := why_not(engine):
            log_dist(f"Checkpoints of this job cannot be resumed on every mesh: {reason}", [0], logging.WARNING)
        loader = None
        if training_data is not None:
            sampler = (
                None
                if isinstance(training_data, torch.utils.data.IterableDataset)
                else tp_sampler(training_data, ranks, seed=seed)
            )
            on_cpu = ranks.device.type == "cpu"  # then processes that load data take what the model computes with
            loader = engine.deepspeed_io(
                training_data,
                data_sampler=sampler,
                collate_fn=collate_fn,
                pin_memory=not on_cpu,
                num_local_io_workers=0 if on_cpu else None,
            )
            engine.training_dataloader = loader
        return engine, optimizer, loader, scheduler

    def save_checkpoint(
        self, engine: Any, folder: str | os.PathLike[str], tag: str | None = None, client_state: Any = None
    ) -> str:
        """Save a job to resume it: weights, optimizer, scheduler, random streams, data position. Returns the tag.

        Every rank calls it, right after an optimizer step. `client_state` is a dict of your own. The default tag is the
        step. A save that dies leaves the checkpoint before it chosen.
        """
        return save_checkpoint(engine, Path(folder), self.document, self.ranks, tag, dict(client_state or {}))

    def load_checkpoint(self, engine: Any, folder: str | os.PathLike[str], tag: str | None = None) -> dict[str, Any]:
        """Resume a job from `tag`, the latest by default. Returns the client state.

        Every rank calls it, after `initialize`. On the plan, mesh and ZeRO stage it was saved with, a job goes on
        exactly as it would have. It may also be another plan of the same model, another number of DP ranks, or
        another of the ZeRO stages 1, 2 and 3: then only the random streams (dropout) are others. Raises
        CheckpointError or MismatchError before anything is changed.
        """
        return load_checkpoint(engine, Path(folder), self.document, self.ranks, tag)

    def save_shards(
        self, engine: Any, folder: str | os.PathLike[str], *, like: str | os.PathLike[str] | None = None
    ) -> None:
        """Save the weights as a shards folder, every rank its own bytes; `autotp-plan merge` makes a checkpoint of it.

        Every rank calls it; `engine` may be a model too. The weights are written in the checkpoint's dtypes. What is
        not trained (tensor names, file split, config, tokenizer) is taken from `like`, a checkpoint or shards folder;
        by default the one that the model was loaded from. Raises ShardsError when `folder` is not a new one.
        """
        model = getattr(engine, "module", engine)
        source = Path(like) if like is not None else model.autotp_loaded_from
        save_shards(model, Path(folder), self.document, self.ranks, source)

    def adapt_trainer(self, trainer: Any) -> None:
        """Make a transformers Trainer with a model from `load_model` count by data-parallel ranks; before it is run.

        Raises MismatchError when it does not run under DeepSpeed, is of another TP size, or its model is another one.
        """
        from autotp_plan.runtime.integrations.trainer import adapt_trainer

        adapt_trainer(trainer, self)

    def add_lora(self, model: nn.Module, config: Any) -> Any:
        """`peft.get_peft_model` for a model from `load_model`, before `initialize`. Raises MismatchError."""
        from autotp_plan.runtime.integrations.lora import add_lora

        adapted = add_lora(model, config, self.document)
        if self.tp_size > 1:
            check_batches(adapted, self.ranks)
        return adapted

    def save_adapter(self, engine: Any, folder: str | os.PathLike[str]) -> None:
        """Write the adapter of a model from `add_lora`, to load on the whole model; every rank calls it."""
        from autotp_plan.runtime.integrations.lora import save_adapter

        save_adapter(engine, Path(folder))

    def sampler(self, dataset: Any, *, shuffle: bool = True, seed: int = 0) -> ResumableSampler:
        """A sampler that gives all TP ranks of a data-parallel group the same samples and each DP rank its own."""
        return tp_sampler(dataset, self.ranks, shuffle=shuffle, seed=seed)


def _skip_lone_sums(engine: Any) -> None:
    """Without ZeRO the engine sums gradients through a flat copy of them all; over one rank that is for nothing.

    What else it does stays: parameters without a gradient get zeros, experts are divided by their number of ranks.
    """
    through_copy = engine.allreduce_and_copy

    def allreduce_and_copy(small_bucket: Any, dp_group: Any, dp_world_size: int | None = None) -> None:
        if torch.distributed.get_world_size(dp_group) > 1 or dp_world_size not in (None, 1):
            through_copy(small_bucket, dp_group, dp_world_size)

    engine.allreduce_and_copy = allreduce_and_copy
