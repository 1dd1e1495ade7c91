"""Which samples a rank trains on: all TP ranks of a DP rank see the same ones, each DP rank others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data.distributed import DistributedSampler

from autotp_plan.runtime.deepspeed.mesh import Ranks


class ResumableSampler(DistributedSampler[Any]):
    """torch's `DistributedSampler` over DP ranks that can begin in the middle of an epoch."""

    start = 0
    begin: Callable[[], None] | None = None
    origin = (0, 0, 0)

    def set_position(self, epoch: int, start: int, begin: Callable[[], None], batches: int) -> None:
        """Begin the next iteration in the middle of an epoch; those after it begin at sample 0.

        Args:
            epoch: the epoch.
            start: the first sample of it, counted among those of this DP rank.
            begin: called at the first sample: a loader that begins an iteration draws a random number before it.
            batches: how many batches this DP rank had before.
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
    """A sampler that gives each DP rank its samples, and all TP ranks of a DP rank the same.

    Call its `set_epoch` each epoch for another order. A job that resumes begins with its `epoch`, not with 0.

    Args:
        dataset: anything with a length.
        ranks: this process's place in the mesh.
        shuffle: whether the order is random.
        seed: decides the order, together with the epoch.
    """
    return ResumableSampler(dataset, num_replicas=ranks.dp_size, rank=ranks.dp_rank, shuffle=shuffle, seed=seed)


def endless(loader: Any) -> Iterator[Any]:
    """The batches of a loader from `initialize`, epoch after epoch, each in another order, from where it stands.

    Args:
        loader: a loader that `initialize` made of data with a length.

    Returns:
        An iterator without end.
    """
    epoch = loader.data_sampler.epoch
    while True:
        loader.data_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1
