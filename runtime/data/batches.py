"""Batches for tensor parallelism: all TP ranks of a data-parallel group see the same ones, each DP rank its own."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import CheckpointError, Fault, MismatchError


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Consecutive windows of `seq_length` tokens, as `input_ids` and `labels`, both `(seq_length,)` int64."""

    def __init__(self, tokens: Tensor, seq_length: int) -> None:
        if len(tokens) < seq_length:
            raise CheckpointError(
                Fault(
                    what="the text is too short to train on",
                    where="--data",
                    got=f"{len(tokens)} tokens",
                    expected=f"at least one window of {seq_length} tokens",
                    next="give more text, or a smaller --seq-length",
                )
            )
        self.windows = tokens[: len(tokens) // seq_length * seq_length].view(-1, seq_length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class ResumableSampler(DistributedSampler[Any]):
    """torch's `DistributedSampler`, that can begin in the middle of an epoch."""

    start = 0
    begin: Callable[[], None] | None = None
    origin = (0, 0, 0)

    def set_position(self, epoch: int, start: int, begin: Callable[[], None], batches: int) -> None:
        """Begin the next iteration at sample `start` of `epoch`, after `batches` batches; those after it begin at 0.

        `begin` is called at its first sample: a loader that begins an iteration draws a random number before.
        """
        self.set_epoch(epoch)
        self.start, self.begin = start, begin
        self.origin = (epoch, start, batches)

    def position(self, batches: int, batch_size: int, drop_last: bool) -> tuple[int, int]:
        """The epoch, and the sample of it that comes next, when this rank has had `batches` batches in all."""
        epoch, start, before = self.origin
        last = 0 if drop_last else batch_size - 1  # the last batch of an epoch may be a smaller one
        left = (len(self) - start + last) // batch_size
        if batches - before < left:
            return epoch, start + (batches - before) * batch_size
        further, batch = divmod(batches - before - left, (len(self) + last) // batch_size)
        return epoch + 1 + further, batch * batch_size

    def __iter__(self) -> Iterator[Any]:
        start, begin = self.start, self.begin
        self.start, self.begin = 0, None
        return self._from(itertools.islice(super().__iter__(), start, None), begin)

    @staticmethod
    def _from(samples: Iterator[Any], begin: Callable[[], None] | None) -> Iterator[Any]:
        if begin is not None:
            begin()
        yield from samples


def tp_sampler(dataset: Any, ranks: Ranks, *, shuffle: bool = True, seed: int = 0) -> ResumableSampler:
    """A sampler over `dataset` by DP rank, the same for all TP ranks of a data-parallel group.

    Call its `set_epoch` each epoch for another order. A job that resumes begins with its `epoch`, not with 0.
    """
    return ResumableSampler(dataset, num_replicas=ranks.dp_size, rank=ranks.dp_rank, shuffle=shuffle, seed=seed)


def check_batches(model: nn.Module, ranks: Ranks) -> None:
    """Have `model` compare over the TP ranks the first batch it gets in training, and the first in evaluation.

    From ranks of one group that were given different samples it would compute numbers that belong to neither. Its
    forward then raises MismatchError, on every rank of the group.
    """
    unseen = {True, False}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training not in unseen:
            return
        unseen.remove(module.training)
        if not unseen:
            handle.remove()
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        mine = {name: _summary(value) for name, value in inputs.items() if isinstance(value, Tensor)}
        found: list[Any] = [None] * ranks.tp_size
        dist.all_gather_object(found, mine, group=ranks.tp_group)
        faults = [
            Fault(
                what="the TP ranks of a group were given different batches",
                where=f"{name} of the first forward in {'training' if module.training else 'evaluation'}",
                got="; ".join(f"TP rank {rank}: {batch.get(name, 'none')}" for rank, batch in enumerate(found)),
                expected="the same samples on all TP ranks of a data-parallel group",
                next="plan.initialize(training_data=...), or a sampler from plan.sampler(dataset); with Hugging Face's "
                "Trainer, plan.adapt_trainer(trainer)",
            )
            for name in dict.fromkeys(name for batch in found for name in batch)
            if len({batch.get(name) for batch in found}) > 1
        ]
        if faults:
            raise MismatchError(faults)

    handle = model.register_forward_pre_hook(compare, with_kwargs=True, prepend=True)


def _summary(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(content.tobytes()).hexdigest()[:12]
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest}"


def endless(loader: Any) -> Iterator[Any]:
    """The batches of a loader from `initialize`, epoch after epoch, each in its own order, from where it stands."""
    epoch = loader.data_sampler.epoch
    while True:
        loader.data_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def text_tokens(path: Path, tokenizer: Any, limit: int | None = None) -> Tensor:
    """The tokens of a text file, or of all the files under a folder in name order: `(tokens,)` int64.

    Files that are not UTF-8 text are left out of a folder. `limit` stops reading when there are that many tokens.
    Raises CheckpointError when nothing can be read.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    tokens: list[int] = []
    for file in files:
        text = _text(file, required=not path.is_dir())
        if text:
            tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if tokenizer.eos_token_id is not None:
                tokens.append(tokenizer.eos_token_id)
        if limit is not None and len(tokens) >= limit:
            break
    return torch.tensor(tokens[:limit], dtype=torch.long)


def synthetic_tokens(vocab_size: int, count: int, seed: int = 0) -> Tensor:
    """`count` random token ids below `vocab_size`, the same for the same seed: `(count,)` int64."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def _text(file: Path, required: bool) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not required:
            return ""
        raise CheckpointError(
            Fault(
                what="the training text cannot be read",
                where=str(file),
                got=getattr(error, "strerror", None) or "bytes that are not UTF-8",
                expected="a text file in UTF-8, or a folder of such files",
                next="correct the path given with --data",
            )
        ) from None
