"""Chunks of a tensor: each byte in one of them, and in the shards where slicing puts it."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from autotp_plan.planner.copying.copy_plan import StoredShard, TensorCopy
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.storage.byte_ranges import ByteRanges


@given(
    random=st.randoms(use_true_random=False),
    size=st.integers(1, 9),
    outer=st.integers(1, 4),
    inner=st.integers(1, 3),
    most=st.integers(1, 40),
)
def test_chunks_copy_each_byte_of_a_shard_once(random: Random, size: int, outer: int, inner: int, most: int) -> None:
    """Against a plain list of bytes: what is copied out of any chunk is what slicing says."""
    indices = random.sample(range(size), random.randint(1, size))
    layout = Layout(shape=(outer, size, inner), dim=1, intervals=(tuple((index, index + 1) for index in indices),))
    data = list(range(outer * size * inner))
    held = [
        data[(block * size + index) * inner + at] for block in range(outer) for index in indices for at in range(inner)
    ]
    shard = StoredShard(ByteRanges(()), layout.shard_copies(0))
    found: dict[int, int] = {}
    for start, stop in TensorCopy(len(data), (shard,), ()).chunks(most):
        assert stop - start <= most
        for strided in shard.copies.within(start, stop):
            first, last = strided.target_range
            copied = [(target + at, source + at) for source, target, length in strided for at in range(length)]
            assert sorted(target for target, _ in copied) == list(range(first, last)), "written in one go"
            assert all(start <= source < stop for _, source in copied)
            assert not found.keys() & dict(copied).keys()
            found.update(copied)
    assert found == dict(enumerate(held))
