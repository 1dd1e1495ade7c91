"""A loader of a stream: data that is read in order and has no index, a torch `IterableDataset`.

Every rank reads the stream. All TP ranks of a DP rank keep the same batches, and DP rank `r` of `n` keeps the batches
`r`, `r + n`, ... of it. So the stream must give the same samples in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from autotp_plan.huggingface.internals import ranks_a_stream_is_split_for
from autotp_plan.runtime.deepspeed.mesh import Ranks
from autotp_plan.schemas.errors import Fault, MismatchError


class StreamLoader:
    """Batches of a stream for this DP rank, from where it stands; each iteration is another epoch.

    Args:
        data: the stream. Its `set_epoch`, where it has one, is called with the epoch before it is read.
        ranks: this process's place in the mesh.
        batch_size: samples per batch of one DP rank.
        drop_last: at the end of the stream, leave out samples that do not fill a batch of every DP rank. Otherwise
            these batches are filled up from the beginning of the stream, and with one DP rank the last one is smaller.
        is_sharded: the stream gives each DP rank other samples by itself, and they are not divided again.
        num_workers: processes that read; the stream divides its samples between them (`get_worker_info`).
        begin_batch: called before each batch is read, by DeepSpeed's timer.
        options: for torch's `DataLoader`.

    Raises:
        MismatchError: the stream is split for another number of ranks.
    """

    def __init__(
        self, data: Any, ranks: Ranks, *, batch_size: int, drop_last: bool, is_sharded: bool, num_workers: int,
        begin_batch: Callable[[], object], **options: Any,
    ) -> None:  # fmt: skip
        _check_split(data, ranks, is_sharded)
        self.dataset = data
        self.is_sharded = is_sharded
        self.num_workers = num_workers
        self.epoch = 0
        self._begin_batch = begin_batch
        self._read = data
        if ranks.dp_size > 1 and not is_sharded:
            self._read = IterableDatasetShard(
                data, batch_size, drop_last, num_processes=ranks.dp_size, process_index=ranks.dp_rank
            )
        self._loader: DataLoader[Any] = DataLoader(
            self._read, batch_size=batch_size, drop_last=drop_last, num_workers=num_workers, **options
        )
        self._origin = (0, 0, 0)  # epoch, batches of it that were read, batches in all
        self._lengths: list[int] = []  # of the epochs that have ended since
        self._skip = 0
        self._begin: Callable[[], None] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration with this epoch."""
        self.epoch = epoch

    def set_position(self, epoch: int, start: int, begin: Callable[[], None], batches: int) -> None:
        """As `ResumableSampler.set_position`; what comes before the position is read and thrown away."""
        self.epoch = epoch
        self._skip = start // self._batch_size
        self._begin = begin
        self._origin, self._lengths = (epoch, self._skip, batches), []

    def position(self, batches: int, batch_size: int, drop_last: bool) -> tuple[int, int]:
        """As `ResumableSampler.position`. How long an epoch is shows when it ends, whatever `drop_last` says."""
        epoch, read, before = self._origin
        read += batches - before
        for length in self._lengths:
            if read < length:
                break
            epoch, read = epoch + 1, read - length
        return epoch, read * batch_size

    def why_not_from(self, start: int, same_mesh: bool) -> str:
        """Why this loader cannot begin with sample `start` of this DP rank; empty when it can."""
        if start % self._batch_size:
            return f"{start} samples of each DP rank are not full batches of {self._batch_size}"
        if self.is_sharded and not same_mesh:
            return "the stream shards itself, and nothing says which samples other DP ranks have had"
        if self.num_workers and not same_mesh:
            return f"{self.num_workers} workers read the stream, each a part of it"
        return ""

    def __iter__(self) -> Iterator[Any]:
        skip, begin = self._skip, self._begin
        self._skip, self._begin = 0, None
        if hasattr(self._read, "set_epoch"):
            self._read.set_epoch(self.epoch)
        batches = iter(self._loader)
        for _ in range(skip):
            next(batches, None)
        if begin is not None:
            begin()
        given = skip
        while True:
            self._begin_batch()
            try:
                batch = next(batches)
            except StopIteration:
                break
            given += 1
            yield batch
        self._lengths.append(given)
        self.epoch += 1

    @property
    def _batch_size(self) -> int:
        assert self._loader.batch_size is not None
        return self._loader.batch_size


def check_not_split(data: Any, ranks: Ranks, where: str, next_step: str) -> None:
    """Raise MismatchError for a stream that was split already, where it would be split a second time."""
    split_for = ranks_a_stream_is_split_for(data)
    if split_for is not None and ranks.dp_size > 1:
        raise MismatchError(
            Fault(
                what="the stream is split already, and would be split once more",
                where=where,
                got=f"a stream split for {split_for} ranks by split_dataset_by_node",
                expected="the stream as it was before: each DP rank is then given its share",
                next=next_step,
            )
        )


def _check_split(data: Any, ranks: Ranks, is_sharded: bool) -> None:
    if not is_sharded:
        check_not_split(data, ranks, "training_data", "initialize(..., data_is_sharded=True)")
    split_for = ranks_a_stream_is_split_for(data)
    if is_sharded and split_for not in (None, ranks.dp_size):
        raise MismatchError(
            Fault(
                what="the stream is split for another number of ranks",
                where="training_data",
                got=f"a stream split for {split_for} ranks",
                expected=f"{ranks.dp_size}: the TP ranks of a DP rank get the same samples",
                next="split_dataset_by_node(data, rank=plan.ranks.dp_rank, world_size=plan.ranks.dp_size)",
            )
        )
