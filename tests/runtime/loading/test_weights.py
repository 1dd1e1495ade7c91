"""Reading shards: the right bytes, to any dtype, through a buffer of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autotp_plan.planner import SpecFile, compile_plan, presplit
from autotp_plan.runtime.loading import read_weights, weights
from autotp_plan.schemas.errors import CheckpointError
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.page_cache import cold, is_cached

TENSORS = {
    "a.q.weight": torch.randn(12, 10, generator=torch.Generator().manual_seed(0)),
    "a.o.weight": torch.randn(10, 12, generator=torch.Generator().manual_seed(1)),
    "norm": torch.arange(5).to(torch.int64),
    "scalar": torch.tensor(2.5),
    "b.odd": torch.arange(3).to(torch.uint8),  # what lay behind it would not be aligned
}
SPEC = {
    "layer_specs": [
        {"patterns": [r"a\.q\.weight$"], "shape": [[6, 6], -1], "unit": 2, "indivisible": "uneven"},
        {"patterns": [r"a\.o\.weight$"], "partition_type": "row", "shape": [-1, [6, 6]], "unit": 2,
         "indivisible": "uneven"},
    ]
}  # fmt: skip


@pytest.fixture
def plan_and_folder(tmp_path: Path) -> tuple[Plan, Path]:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "model.safetensors")
    return compile_plan(tmp_path, tp_size=2, specs=[SpecFile.from_dict(SPEC)]), tmp_path


@pytest.mark.parametrize("chunk_bytes", [8, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_shard_of_a_weight(
    plan_and_folder: tuple[Plan, Path],
    monkeypatch: pytest.MonkeyPatch,
    chunk_bytes: int,
    dtype: torch.dtype | None,
    rank: int,
) -> None:
    plan, folder = plan_and_folder
    monkeypatch.setattr(read_weights, "CHUNK_BYTES", chunk_bytes)
    rows = [0, 1, 2, 3, 6, 7, 8, 9] if rank == 0 else [4, 5, 10, 11]
    expected = {**TENSORS, "a.q.weight": TENSORS["a.q.weight"][rows], "a.o.weight": TENSORS["a.o.weight"][:, rows]}
    read = {
        weight.name: read_weights.read_weight(weight, torch.device("cpu"), dtype)
        for weight in weights.open_weights(folder, plan).of_rank(rank)
    }
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert read[name].dtype == wanted.dtype and torch.equal(read[name], wanted), name


def test_a_file_that_shrinks_while_it_is_read(plan_and_folder: tuple[Plan, Path]) -> None:
    plan, folder = plan_and_folder
    source = weights.open_weights(folder, plan)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="a file ended early"):
        for weight in source.of_rank(0):
            read_weights.read_weight(weight, torch.device("cpu"), None)


@pytest.fixture
def plan_and_shards(plan_and_folder: tuple[Plan, Path]) -> tuple[Plan, Path]:
    plan, folder = plan_and_folder
    presplit(plan, folder, folder / "shards")
    return plan, folder / "shards"


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_are_what_the_checkpoint_gives(
    plan_and_folder: tuple[Plan, Path], plan_and_shards: tuple[Plan, Path], dtype: torch.dtype | None, rank: int
) -> None:
    plan, folder = plan_and_folder
    both = [
        {
            w.name: read_weights.read_weight(w, torch.device("cpu"), dtype)
            for w in weights.open_weights(of, plan).of_rank(rank)
        }
        for of in (folder, plan_and_shards[1])
    ]
    assert both[0].keys() == both[1].keys()
    for name, tensor in both[0].items():
        assert tensor.dtype == both[1][name].dtype and torch.equal(tensor, both[1][name]), name


def test_what_is_written_to_a_mapped_weight_stays_in_this_process(plan_and_shards: tuple[Plan, Path]) -> None:
    plan, shards = plan_and_shards
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    read = [
        read_weights.read_weight(weight, torch.device("cpu"), None)
        for weight in weights.open_weights(shards, plan).of_rank(1)
    ]
    kept = [tensor.clone() for tensor in read]
    for tensor in read:
        tensor.zero_()
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    again = [
        read_weights.read_weight(w, torch.device("cpu"), None) for w in weights.open_weights(shards, plan).of_rank(1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(again, kept)) and not any(tensor.any() for tensor in read)


def test_a_mapped_weight_is_its_own_storage(plan_and_shards: tuple[Plan, Path]) -> None:
    """So that saving one with torch saves its bytes and not its file's."""
    plan, shards = plan_and_shards
    for weight in weights.open_weights(shards, plan).of_rank(0):
        tensor = read_weights.read_weight(weight, torch.device("cpu"), None)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.data_ptr() % tensor.element_size() == 0, "presplit puts wide dtypes first"


def test_shards_that_shrink_while_they_are_read(plan_and_shards: tuple[Plan, Path]) -> None:
    plan, shards = plan_and_shards
    source = weights.open_weights(shards, plan)
    for path in shards.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="a file ended early"):
        for weight in source.of_rank(0):
            read_weights.read_weight(weight, torch.device("cpu"), None)


def test_pages_of_shards_are_not_this_process_s_own(tmp_path: Path) -> None:
    """48 MiB: mapped, they are pages of the file; read, they would be anonymous memory."""
    save_file({"a.q.weight": torch.ones(12 * 2**20, 2)}, tmp_path / "model.safetensors")
    spec = {"layer_specs": [{"patterns": [r"a\.q\.weight$"], "partition_type": "column", "gather_output": True}]}
    plan = compile_plan(tmp_path, tp_size=2, specs=[SpecFile.from_dict(spec)])
    presplit(plan, tmp_path, tmp_path / "shards")

    def anonymous(folder: Path) -> int:
        before = rss_anon()
        (weight,) = weights.open_weights(folder, plan).of_rank(0)
        tensor = read_weights.read_weight(weight, torch.device("cpu"), None)
        assert float(tensor.sum()) == tensor.numel() == 12 * 2**20
        return rss_anon() - before

    assert anonymous(tmp_path / "shards") < 8 * 2**20
    assert anonymous(tmp_path) > 40 * 2**20  # what this measures is there to be seen


def rss_anon() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_weights_are_read_in_order_while_the_next_ones_are_under_way(
    plan_and_folder: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = plan_and_folder
    source = weights.open_weights(folder, plan)
    one_by_one = {w.name: read_weights.read_weight(w, torch.device("cpu"), None) for w in source.of_rank(1)}
    for readers, batch_bytes in ((1, 1), (2, 100), (16, 1 << 20)):
        monkeypatch.setattr(read_weights, "READERS", readers)
        monkeypatch.setattr(read_weights, "BATCH_BYTES", batch_bytes)
        read = list(read_weights.read_weights(source.of_rank(1), torch.device("cpu"), {"a.q.weight": torch.float64}))
        assert [weight.name for weight, _ in read] == list(one_by_one)
        for weight, tensor in read:
            assert tensor.dtype == (torch.float64 if weight.name == "a.q.weight" else one_by_one[weight.name].dtype)
            assert torch.equal(tensor, one_by_one[weight.name].to(tensor.dtype)), weight.name
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="a file ended early"):
        list(read_weights.read_weights(source.of_rank(1), torch.device("cpu"), {}))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_large_weights_are_read_into_huge_pages(tmp_path: Path, dtype: torch.dtype | None) -> None:
    full = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    save_file({"a.q.weight": full}, tmp_path / "model.safetensors")
    spec = {"layer_specs": [{"patterns": [r"a\.q\.weight$"], "partition_type": "row", "split_input": True}]}
    plan = compile_plan(tmp_path, tp_size=1, specs=[SpecFile.from_dict(spec)])
    (weight,) = weights.open_weights(tmp_path, plan).of_rank(0)
    tensor = read_weights.read_weight(weight, torch.device("cpu"), dtype)
    assert tensor.nbytes > read_weights.HUGE_BYTES and torch.equal(tensor, full.to(tensor.dtype))
    tensor.add_(1)  # the memory is its own
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_is_not_in_the_page_cache_is_read_past_it_where_nobody_else_reads_it(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.randn(shape, generator=draw).to(torch.bfloat16)
        for name, shape in (("a.q.weight", (3001, 1200)), ("a.o.weight", (1200, 3001)), ("a.k.weight", (2000, 1000)))
    }
    source, shards = tmp_path / "model.safetensors", tmp_path / "shards"
    save_file(tensors, source)
    spec = {
        "layer_specs": [
            {"patterns": [r"a\.q\.weight$"], "partition_type": "column", "indivisible": "uneven"},
            {"patterns": [r"a\.o\.weight$"], "partition_type": "row", "indivisible": "uneven"},
            {"patterns": [r"a\.k\.weight$"], "partition_type": "skip"},
        ]
    }
    plan = compile_plan(tmp_path, tp_size=2, specs=[SpecFile.from_dict(spec)])
    cold(source)
    presplit(plan, tmp_path, shards)
    assert not is_cached(source)
    files = {name: next(shards.glob(f"{name}*.safetensors")) for name in ("tp-00", "tp-01", "shared")}
    expected = {
        0: {**tensors, "a.q.weight": tensors["a.q.weight"][:1501], "a.o.weight": tensors["a.o.weight"][:, :1501]},
        1: {**tensors, "a.q.weight": tensors["a.q.weight"][1501:], "a.o.weight": tensors["a.o.weight"][:, 1501:]},
    }
    for rank, once, dtype in ((0, True, None), (1, True, torch.float32), (0, False, None)):
        cold(*files.values())
        of_rank = weights.open_weights(shards, plan, map_shards=False).of_rank(rank)
        dtypes = {} if dtype is None else dict.fromkeys(tensors, dtype)
        for weight, tensor in read_weights.read_weights(of_rank, torch.device("cpu"), dtypes, once=once):
            assert torch.equal(tensor, expected[rank][weight.name].to(dtype or torch.bfloat16)), (rank, weight.name)
            tensor.add_(1)  # the memory is its own
        assert is_cached(files["shared"]), "the other rank reads it too"
        assert is_cached(files[f"tp-0{rank}"]) == (not once)
