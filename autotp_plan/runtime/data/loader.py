"""The loader that `initialize` makes of training data, with a length or without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from autotp_plan.runtime.data.sampler import tp_sampler
from autotp_plan.runtime.data.stream import StreamLoader
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError


def training_loader(
    engine: Any, data: Any, ranks: Ranks, collate_fn: Callable[[Any], Any] | None = None, *,
    seed: int, num_workers: int | None = None, is_sharded: bool = False,
) -> Any:  # fmt: skip
    """The engine's loader of `data`: the same batches on all TP ranks of a DP rank, others on each DP rank.

    Args:
        engine: the DeepSpeed engine, which is told of the loader.
        data: a dataset with a length, or a stream (`IterableDataset`).
        ranks: this process's place in the mesh.
        collate_fn: makes a batch of samples; None for the engine's, else torch's.
        seed: decides the order of data with a length, together with the epoch.
        num_workers: processes that read; None for the default.
        is_sharded: `data` is a stream that gives each DP rank other samples by itself.

    Returns:
        DeepSpeed's loader; a `StreamLoader` for a stream.

    Raises:
        MismatchError: `data` is no dataset, or a stream split for other ranks.
    """
    on_cpu = ranks.device.type == "cpu"  # then processes that load data take what the model computes with
    if isinstance(data, IterableDataset):
        engine.training_dataloader = StreamLoader(
            data,
            ranks,
            batch_size=engine.train_micro_batch_size_per_gpu(),
            drop_last=engine.dataloader_drop_last(),
            is_sharded=is_sharded,
            num_workers=num_workers or 0,
            begin_batch=engine.tput_timer.start,
            collate_fn=collate_fn or engine.collate_fn,
            pin_memory=not on_cpu,
        )
    else:
        _check_dataset(data, is_sharded)
        engine.training_dataloader = engine.deepspeed_io(
            data,
            data_sampler=tp_sampler(data, ranks, seed=seed),
            collate_fn=collate_fn,
            pin_memory=not on_cpu,
            num_local_io_workers=0 if on_cpu and num_workers is None else num_workers,
        )
    return engine.training_dataloader


def _check_dataset(data: Any, is_sharded: bool) -> None:
    what = "no loader can be made of this training data"
    if is_sharded:
        raise MismatchError(
            Fault(
                what=what,
                where="data_is_sharded",
                got=f"{type(data).__name__}, which is no IterableDataset",
                expected="a stream: other data is divided by a sampler",
                next="leave data_is_sharded out",
            )
        )
    if isinstance(data, DataLoader) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise MismatchError(
            Fault(
                what=what,
                where="training_data",
                got=type(data).__name__,
                expected="a dataset with __len__ and __getitem__, or an IterableDataset",
                next="give the dataset, or iterate over a loader of yours: DataLoader(dataset, "
                "sampler=plan.sampler(dataset)), or of a stream that is divided by plan.ranks.dp_rank",
            )
        )
