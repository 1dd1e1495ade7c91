"""Steps of a job whose loader came from `plan.initialize`, over the ends of epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def batches(loader: Any) -> Iterator[Any]:
    """Batches without end, from where the loader's sampler is."""
    epoch = loader.data_sampler.epoch
    while True:
        loader.data_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1
