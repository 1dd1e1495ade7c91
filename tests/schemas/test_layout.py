"""What a layout says of positions: a shard's bytes are those that slicing gives, and all ranks read each byte once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.storage.safetensors_header import item_size, num_bytes
from tests.helpers.checkpoints import tensor_bytes


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from(["U8", "BF16", "F64"]),
)
def test_shard_copies_are_a_shards_bytes(shape: list[int], data: st.DataObject, dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    edges = sorted({0, shape[dim], *data.draw(st.sets(st.integers(0, shape[dim])))})
    wanted = data.draw(st.lists(st.sampled_from(list(zip(edges, edges[1:]))), unique=True))
    known = {"sub_parameters": (SubParameter(size=shape[dim], unit=1),), "intervals": (tuple(wanted),)}
    layout = Layout(shape=tuple(shape), dim=dim, **known)  # type: ignore[arg-type]
    full = tensor_bytes("w", dtype, shape)
    by_hand = b""
    for index in range(num_bytes(dtype, shape[:dim]) // item_size(dtype)):
        inner = num_bytes(dtype, shape[dim + 1 :])
        for start, stop in wanted:
            by_hand += full[(index * shape[dim] + start) * inner : (index * shape[dim] + stop) * inner]
    copies = list(layout.shard_copies(0, item_size(dtype)))
    assert b"".join(full[source : source + length] for source, _, length in copies) == by_hand
    reached = 0
    for copy in copies:
        assert copy.target == reached, "in the order of the shard, without gaps"
        reached += copy.length


@given(st.data())
def test_ranks_hold_each_element_first_once(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 7))
    ranks = data.draw(st.lists(st.permutations(range(size)), min_size=1, max_size=4))
    ends = [data.draw(st.integers(0, size)) for _ in ranks]
    held = tuple(tuple((index, index + 1) for index in rank[:end]) for rank, end in zip(ranks, ends))
    layout = Layout(shape=(2, size, 3), dim=1, intervals=held)
    seen: set[int] = set()
    for rank, intervals in enumerate(held):
        shard = [(block * size + index) * 3 + at for block in range(2) for index, _ in intervals for at in range(3)]
        copied = {
            source + at: target + at
            for source, target, length in layout.first_held_copies(rank)
            for at in range(length)
        }
        assert copied.keys() == set(shard) - seen
        assert all(shard[target] == source for source, target in copied.items())
        seen |= set(shard)


def test_a_replicated_tensor_is_one_copy_that_rank_0_holds_first() -> None:
    layout = Layout(shape=(4, 3))
    assert list(layout.shard_copies(1, 2)) == list(layout.first_held_copies(0, 2)) == [iv.Copy(0, 0, 24)]
    assert list(layout.first_held_copies(1, 2)) == []
    assert list(Layout(shape=()).shard_copies(0, 8)) == [iv.Copy(0, 0, 8)]
    full = Layout(shape=(4, 3), dim=1, intervals=(((0, 1), (1, 3)), ((0, 3),)))
    assert full.shard_copies(0) == full.shard_copies(1) == layout.shard_copies(0)
