"""`load_plan`, and what its plan can do: load this rank's model, start an engine, feed it, save and resume the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp_plan.runtime.calls.loaded import loaded_of
from autotp_plan.runtime.checkpoint.job import save_checkpoint
from autotp_plan.runtime.checkpoint.outputs import check_outputs
from autotp_plan.runtime.checkpoint.resume import load_checkpoint
from autotp_plan.runtime.checkpoint.save_shards import save_shards
from autotp_plan.runtime.data.sampler import ResumableSampler, tp_sampler
from autotp_plan.runtime.deepspeed.engine_config import engine_config
from autotp_plan.runtime.deepspeed.mesh import Ranks, check_timeout, init_ranks
from autotp_plan.runtime.deepspeed.store_internals import set_time_limit
from autotp_plan.runtime.load_model import load_model
from autotp_plan.runtime.make_engine import make_engine
from autotp_plan.runtime.optimizers.choose import (
    adapt_optimizer,
)
from autotp_plan.runtime.optimizers.sharded_weights import sharded_weights
from autotp_plan.schemas.errors import Fault, MismatchError
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.sources.model_folder import model_folder


def load_plan(path: str | os.PathLike[str]) -> TrainingPlan:
    """Read a plan to train by.

    Args:
        path: a plan file.

    Returns:
        The plan, at work in this process.

    Raises:
        DocumentError: with everything that is wrong with the file.
    """
    return TrainingPlan(Plan.read(Path(path)))


class TrainingPlan:
    """A plan at work in one process.

    Args:
        document: the plan as it was read.
    """

    def __init__(self, document: Plan) -> None:
        self.document = document
        self._ranks: Ranks | None = None
        self._timeout: float | None = None

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.document.tp_size

    @property
    def ranks(self) -> Ranks:
        """TP and DP ranks, sizes, process groups and device of this process.

        Raises:
            MismatchError: the mesh has not been made yet, by `init_mesh` or a method that calls it.
        """
        if self._ranks is None:
            raise MismatchError(
                Fault(
                    what="the process groups of this plan have not been made yet",
                    where="plan.ranks",
                    got="a plan whose mesh was not initialised",
                    expected="to be read after load_model, sampler or init_mesh",
                    next="call plan.init_mesh() first: it makes the groups and returns the ranks",
                )
            )
        return self._ranks

    def init_mesh(self, *, timeout: float | None = None) -> Ranks:
        """Make the TP x DP mesh, once; `load_model`, `sampler` and the other methods call it where it is needed.

        Initialises torch.distributed and DeepSpeed's process groups where the caller has not. Every rank calls it.

        Args:
            timeout: seconds that a rank waits for another in a collective before it raises, of all process groups, also
                of those that `load_model` and `initialize` make. None for DeepSpeed's 600 (`DEEPSPEED_TIMEOUT`, in
                minutes), or what the caller has given to `init_process_group`.

        Returns:
            TP and DP ranks, sizes, process groups and device of this process; the same as `ranks` from then on.

        Raises:
            MismatchError: the world size, or process groups that exist already, do not fit the plan.
            OptionError: `timeout` is not positive.
        """
        if timeout is not None:
            check_timeout(timeout)
            self._timeout = timeout
        if self._ranks is None:
            self._ranks = init_ranks(self.tp_size)
        if timeout is not None:
            set_time_limit(timeout)
        return self._ranks

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
        loss_chunks: int | None = None,
        check_batches_every: int | None = 100,
        activation_checkpointing: str | None = None,
        **options: Any,
    ) -> nn.Module:
        """Load this rank's part of the model, ready for `initialize`. Every rank calls it.

        The model's first forward in training and in evaluation, and every 100th, raises MismatchError when the TP ranks
        were given different batches.

        Args:
            path: a shards folder, or the original checkpoint (a folder, an id of the hub or a URL), of which only this
                rank's intervals are read.
            model: your own module, built on meta, or a function that builds it; None builds the transformers model that
                the folder's config.json describes.
            dtype: floating-point dtype to convert to; None takes what the plan says, else what the config says, as
                `from_pretrained(path, dtype="auto")` does. What transformers keeps in float32 is float32. Your own
                module with None gets the dtypes of the files.
            verify_checksums: read every shard file once more and compare its checksum (sizes, headers, fingerprints,
                and the checksums of config, tokenizer and other small files are always compared).
            map_shards: map a pre-split weight that stays on the CPU in its dtype: each page is read when it is used,
                and copied when it is written to. False reads it at once, for a folder that is slow, or that is removed
                from a network disk while the job trains.
            share_input_gradients: all-reduce the gradient of a tensor once, not once for each of the layers that take
                it (q, k and v; gate and up). With `tp_overlap_comm` each layer all-reduces its own.
            vocab_parallel_loss: in training with labels, let a transformers causal LM compute its loss from each rank's
                logits. The all-gather of `output.logits` is then deferred to first use, which every rank of the TP
                group must make; without labels, or in evaluation, they are gathered at once.
            loss_chunks: in training with labels, compute the loss from the logits of this many chunks of the rank's
                words, one at a time and again in the backward, so that no more than one chunk's logits exist. With
                `tp_size` 1 too. `output.logits` are computed at first use, which every rank of the TP group must make.
                None computes a rank's logits at once.
            check_batches_every: n: the batches of the TP ranks are compared, by one small all-reduce, at the forwards
                1, n + 1, 2n + 1, ..., counted in training and in evaluation. None compares nothing.
            activation_checkpointing: `"full"`: layers keep their inputs alone and compute the rest again in the
                backward, with its all-reduces. `"selective"`: they keep results of matrix products with weights and of
                collectives too, and compute attention, norms and activation functions again. None keeps everything.
            options: for transformers, such as `attn_implementation`.

        Returns:
            The model, on this rank's device.

        Raises:
            MismatchError: plan, folder, model and world size do not belong together; or the weights are of several
                dtypes, and none is named; or the model's loss cannot be computed in chunks, or the model does not
                know activation checkpointing.
            ShardsError: the shards folder is not complete, or not what its manifest says.
            CheckpointError: the checkpoint cannot be read, or transformers cannot build its model.
            DocumentError: a JSON file in the folder is not what it should be.
            OptionError: `check_batches_every` or `loss_chunks` is less than 1; or there is no such
                `activation_checkpointing`.

        All of them before anything is loaded; where one rank raises, the others do, and none waits for it.
        """
        return load_model(
            self.document,
            self.init_mesh,
            path,
            model=model,
            dtype=dtype,
            verify_checksums=verify_checksums,
            map_shards=map_shards,
            share_input_gradients=share_input_gradients,
            vocab_parallel_loss=vocab_parallel_loss,
            check_batches_every=check_batches_every,
            loss_chunks=loss_chunks,
            activation_checkpointing=activation_checkpointing,
            options=options,
        )

    def initialize(
        self,
        model: nn.Module,
        *,
        config: str | os.PathLike[str] | dict[str, Any],
        training_data: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        data_is_sharded: bool = False,
        skip_lone_sums: bool = True,
        split_fused: bool = False,
        check_finite: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """`deepspeed.initialize` for a model from `load_model`. Every rank calls it.

        Args:
            model: the model.
            config: a DeepSpeed config file or dict. Its batch sizes count data-parallel ranks; its `tensor_parallel`
                section, where it has one, must be of the plan's TP size.
            training_data: a dataset for the loader. Of a stream (torch's `IterableDataset`) every rank reads all
                samples, in the same order, and data-parallel rank r of n keeps the batches r, r + n, ...
            collate_fn: makes a batch of samples; None for torch's.
            seed: decides the order of the samples, together with the epoch; a stream has an order of its own.
            num_workers: processes that read data; None for DeepSpeed's number where there is an accelerator, 0 on CPU
                and for a stream. A stream divides its samples between them (`torch.utils.data.get_worker_info`).
            data_is_sharded: `training_data` is a stream that gives each data-parallel rank other samples by itself, and
                the TP ranks of one the same.
            skip_lone_sums: with one DP rank and without ZeRO, do not copy gradients for DeepSpeed's all-reduce over
                that rank.
            split_fused: let an optimizer that looks at whole matrices (Muon) step q, k and v, or gate and up, of a
                fused weight each by itself. Without it the fused weight is one matrix, as in the unsharded model.
            check_finite: stop with NonFiniteError when a loss, a gradient norm or a weight that is to be saved is NaN
                or inf. In float32 without ZeRO, where no norm is computed, losses are compared every tenth step. Steps
                that fp16's loss scaling skips are no stop, a hundred in a row are.
            kwargs: for `deepspeed.initialize`. An `mpu` of an older script is compared with the plan and not used.

        Returns:
            `(engine, optimizer, loader, scheduler)`. The loader gives all TP ranks of a data-parallel group the same
            batches; None without `training_data`.

        Raises:
            MismatchError: the config has a wrong value; or it, an `mpu` or a call of `deepspeed.tp_model_init` is for
                another mesh; or `training_data` is no dataset.
            DocumentError: the config file cannot be read.
        """
        return make_engine(
            self.document,
            self.init_mesh(),
            model,
            config,
            training_data=training_data,
            collate_fn=collate_fn,
            seed=seed,
            num_workers=num_workers,
            data_is_sharded=data_is_sharded,
            skip_lone_sums=skip_lone_sums,
            split_fused=split_fused,
            check_finite=check_finite,
            timeout=self._timeout,
            arguments=kwargs,
        )

    def adapt_optimizer(self, model: nn.Module, optimizer: Any, *, split_fused: bool = False) -> None:
        """Let an optimizer step a model from `load_model` in a loop without an engine. Every rank calls it.

        `initialize` does it for the optimizer of an engine. One that looks at whole matrices or tensors (Muon,
        Adafactor, LAMB) then steps each sharded weight in full, on one of the TP ranks; others stay as they are.

        Args:
            model: the model.
            optimizer: an optimizer of its parameters, before its first step.
            split_fused: step q, k and v, or gate and up, of a fused weight each by itself, with a state of its own.
                Without it the fused weight is one matrix, as in the unsharded model.

        Raises:
            MismatchError: the optimizer cannot be right on a sharded model.
        """
        if self.tp_size > 1 or split_fused:
            adapt_optimizer(optimizer, sharded_weights(model), split_fused)

    def check_outputs(
        self,
        config: str | os.PathLike[str] | dict[str, Any],
        *,
        checkpoints: str | os.PathLike[str] | None = None,
        shards: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        saves: int = 1,
    ) -> None:
        """Find out before training whether `save_checkpoint` and `save_shards` can write. Every rank calls it.

        Each rank writes, syncs and removes a small file in each folder, and the first one compares the free space with
        what a job writes that trains all weights.

        Args:
            config: the DeepSpeed config file or dict that `initialize` gets.
            checkpoints: the folder for `save_checkpoint`.
            shards: the folder for `save_shards`.
            dtype: of the model, as for `load_model`.
            saves: how many more checkpoints there will be at a time than now: with `keep_last=n`, n + 1 in a new
                folder. 0 does not ask for room for them.

        Raises:
            OutputError: a folder cannot be written to, `save_shards` would refuse it, or there is not enough room. The
                same on every rank, as all errors.
            DocumentError: the config file cannot be read.
        """
        settings = engine_config(config, self.document)
        self.init_mesh()
        check_outputs(
            self.document,
            settings,
            checkpoints=Path(checkpoints) if checkpoints is not None else None,
            shards=Path(shards) if shards is not None else None,
            dtype=dtype,
            saves=saves,
        )

    def save_checkpoint(
        self,
        engine: Any,
        folder: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Any = None,
        *,
        keep_last: int | None = None,
        take_over: bool = False,
    ) -> str:
        """Save a job to resume it. Every rank calls it, right after an optimizer step.

        Saved are weights, optimizer, scheduler, random state and data position, each file with its checksum. The
        checkpoint is named the latest when all of it is on disk; a save that dies leaves the one before it.

        Args:
            engine: the engine from `initialize`.
            folder: the folder of all checkpoints of the job.
            tag: the name of this one; None for the number of the step.
            client_state: a dict that `load_checkpoint` returns.
            keep_last: remove older checkpoints than so many, when this one is the latest; None keeps all.
            take_over: write although the lock of the folder names another job, which has ended on another host. Only
                file systems without locks need it.

        Returns:
            The tag.

        Raises:
            MismatchError: gradients have been accumulated since the last optimizer step.
            NonFiniteError: a weight is NaN or inf; with `check_finite=False` it is saved, and said.
            CheckpointError: the tag is no name of a folder, or something would be overwritten.
            OptionError: `keep_last` is less than 1.
            OutputError: the folder cannot be written to, or another job writes to it.
        """
        return save_checkpoint(
            engine, Path(folder), self.document, self.init_mesh(), tag, dict(client_state or {}), keep_last, take_over
        )

    def load_checkpoint(
        self, engine: Any, folder: str | os.PathLike[str], tag: str | None = None, *, trust_checkpoint: bool = False
    ) -> dict[str, Any]:
        """Resume a job. Every rank calls it, after `initialize`.

        On the plan, mesh and ZeRO stage it was saved with, a job continues exactly as it would have. It may also resume
        by another plan of the same model, on another number of DP ranks, or under another of the ZeRO stages 1, 2 and
        3: then only the random numbers (dropout) are others.

        Args:
            engine: the engine from `initialize`.
            folder: the folder of all checkpoints of the job.
            tag: which checkpoint; None for the latest.
            trust_checkpoint: unpickle its files, whatever they hold. They are read as data otherwise: tensors, numbers,
                text, lists, dicts, and DeepSpeed's own classes.

        Returns:
            The client state that was saved.

        Raises:
            CheckpointError: there is no complete checkpoint, or its bytes are not those that were saved; the error
                names the newest checkpoint that is sound. Or it holds more than data.
            MismatchError: it is of another model, or can be resumed only on the mesh it was saved on.

        Both before anything is changed.
        """
        return load_checkpoint(engine, Path(folder), self.document, self.init_mesh(), tag, trust_checkpoint)

    def save_shards(
        self, engine: Any, folder: str | os.PathLike[str], *, like: str | os.PathLike[str] | None = None
    ) -> None:
        """Save the weights as a shards folder, in the checkpoint's dtypes. Every rank calls it.

        Each rank writes the bytes it holds; `autotp-plan merge` makes a checkpoint of the folder.

        Args:
            engine: the engine, or the model.
            folder: a new folder.
            like: a checkpoint or shards folder to take from what is not trained: tensor names, file split, config,
                tokenizer. None for the folder that the model was loaded from.

        Raises:
            OutputError: `folder` is not a new one, or cannot be written.
        """
        model = getattr(engine, "module", engine)
        _refuse_adapters(model)
        source = model_folder(like) if like is not None else loaded_of(model).source
        save_shards(model, Path(folder), self.document, self.init_mesh(), source)

    def adapt_trainer(self, trainer: Any) -> None:
        """Let a transformers Trainer with a model from `load_model` count by data-parallel ranks; before it is run.

        Args:
            trainer: the Trainer, of any class.

        Raises:
            MismatchError: it does not run under DeepSpeed, is of another TP size, or its model is not the plan's.
        """
        from autotp_plan.runtime.integrations.trainer import adapt_trainer

        adapt_trainer(trainer, self.document, self.init_mesh(), self.initialize)

    def adapt_accelerator(self, accelerator: Any) -> None:
        """Let an Accelerator count by data-parallel ranks; before `accelerator.prepare` of a model from `load_model`.

        Args:
            accelerator: an `accelerate.Accelerator` with a DeepSpeed plugin.

        Raises:
            MismatchError: it does not run under DeepSpeed, or is of another TP size.
        """
        from autotp_plan.runtime.integrations.accelerator import adapt_accelerator

        adapt_accelerator(accelerator, self.document, self.init_mesh(), self.initialize)

    def add_lora(self, model: nn.Module, config: Any) -> Any:
        """`peft.get_peft_model` for a model from `load_model`, before `initialize`. Every rank calls it.

        Args:
            model: the model.
            config: a `peft.LoraConfig`.

        Returns:
            The `PeftModel`.

        Raises:
            MismatchError: the config has options, or names modules, that no tensor-parallel adapter is there for.
        """
        from autotp_plan.runtime.integrations.lora import add_lora

        return add_lora(model, config)

    def load_adapter(
        self, model: Any, folder: str | os.PathLike[str], *, name: str = "default", is_trainable: bool = True
    ) -> Any:
        """Go on from an adapter that `save_adapter`, or PEFT for an unsharded model, wrote. Every rank calls it.

        Args:
            model: a model from `load_model`, or one from `add_lora` or this method that gets one adapter more.
            folder: the adapter's folder.
            name: the adapter's name; it is the active one from then on.
            is_trainable: whether it is trained.

        Returns:
            The `PeftModel`.

        Raises:
            CheckpointError: there is no adapter in the folder.
            MismatchError: the adapter is of another model, or of a kind that no tensor-parallel adapter is there for.
        """
        from autotp_plan.runtime.integrations.lora import load_adapter

        return load_adapter(model, Path(folder), name, is_trainable)

    def save_adapter(self, engine: Any, folder: str | os.PathLike[str]) -> None:
        """Write the adapter of a model from `add_lora` as PEFT does for an unsharded model. Every rank calls it."""
        from autotp_plan.runtime.integrations.lora import save_adapter

        save_adapter(engine, Path(folder))

    def sampler(self, dataset: Any, *, shuffle: bool = True, seed: int = 0) -> ResumableSampler:
        """A sampler that gives each DP rank its samples, and all TP ranks of a DP rank the same.

        Args:
            dataset: anything with a length.
            shuffle: whether the order is random.
            seed: decides the order, together with the epoch.
        """
        return tp_sampler(dataset, self.init_mesh(), shuffle=shuffle, seed=seed)


def _refuse_adapters(model: nn.Module) -> None:
    if "peft" in sys.modules:
        from autotp_plan.runtime.integrations.lora import refuse_adapters

        refuse_adapters(model, "plan.save_shards")
