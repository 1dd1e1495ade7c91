"""Shards saved by a running job are those that `presplit` would make of its weights, and merge into a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]

JOBS: dict[str, tuple[str, dict[str, Any], int, int]] = {  # name: variant, changes, TP size, ZeRO stage
    "fused and grouped": ("phi3", {}, 2, 1),
    "shared in part": ("phi3", {}, 4, 2),
    "experts": ("mixtral", {}, 2, 3),
    "tied and stored": (
        "llama",
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 48,
            "vocab_size": 257,
        },
        2,
        3,
    ),
    "rows": ("gpt2", {}, 2, 0),
}
REPLACED = "tied and stored"
"""The job whose shards another folder takes the place of while it trains."""
TP_SIZES = (2, 4)
TABLES = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]


def specs_of(name: str) -> list[Any]:
    """The spec files of a job."""
    from autotp_plan.schemas.spec import SpecFile

    head = {"layer_specs": [{"patterns": ["lm_head\\.weight$"], "partition_type": "skip"}]}
    return [SpecFile.from_dict(head)] if name == "experts" else []


def store_the_head_too(folder: Path) -> None:
    """Add a head that is tied to the embedding, as some checkpoints on the hub have it; and a table nobody reads."""
    import json

    import torch
    from safetensors.torch import save_file

    from autotp_plan.schemas.storage.checkpoint import read_checkpoint
    from autotp_plan.schemas.storage.files import local_path

    entry = read_checkpoint(folder).tensors["model.embed_tokens.weight"]
    data = bytearray(local_path(entry.file).read_bytes()[entry.start : entry.stop])
    head = torch.frombuffer(data, dtype=torch.float32).view(entry.shape)
    tensors = {"lm_head.weight": head, **{name: torch.arange(77) for name in TABLES}}
    save_file(tensors, folder / "model-more.safetensors", {"format": "pt"})
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"].update(dict.fromkeys(tensors, "model-more.safetensors"))
    index_path.write_text(json.dumps(index))


def train_and_save(work: Path, tp_size: int) -> dict[str, float]:
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity
    from tests.helpers.models import batch

    found = {}
    for name, (_, _, size, stage) in JOBS.items():
        if size != tp_size:
            continue
        plan = load_plan(work / name / "plan.json")
        source = work / name / ("shards" if stage % 2 else "whole")
        if name == REPLACED:
            source = (
                source.rename(work / name / "mapped") if torch.distributed.get_rank() == 0 else work / name / "mapped"
            )
            torch.distributed.barrier()
        model = plan.load_model(source).train()
        plan.save_shards(model, work / name / "untrained")
        if name == REPLACED:
            if torch.distributed.get_rank() == 0:
                shutil.copytree(source, work / name / "shards")
                shutil.rmtree(source)
                shutil.copytree(work / "experts" / "shards", source)
            torch.distributed.barrier()
            plan.save_shards(model, work / name / "untrained, another folder")
        engine, _, _, _ = plan.initialize(model, config=parity.engine_settings(stage))
        for step in range(2):
            tokens = batch(10 * step + plan.ranks.dp_rank)
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()
        plan.save_shards(engine, work / name / "trained")
        with torch.no_grad():
            tokens = batch(77)
            found[name] = engine(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("save")
    for name, (variant, changes, tp_size, _) in JOBS.items():
        folder = save_checkpoint(work / name / "whole", variant, **changes)
        if name == "tied and stored":
            store_the_head_too(folder)
        plan = compile_plan(folder, tp_size=tp_size, uneven="vocab_size" in changes, specs=specs_of(name))
        (work / name / "plan.json").write_text(plan.to_json())
        presplit(plan, folder, work / name / "shards", max_file_bytes=50_000)
    losses: dict[str, float] = {}
    for tp_size in TP_SIZES:
        ranks = launch(train_and_save, 4, work, tp_size, timeout=150)
        losses.update(ranks[0])
        assert all(found == pytest.approx(ranks[0], rel=1e-6) for found in ranks)
    return work, losses


@pytest.mark.parametrize("name", JOBS)
def test_untrained_shards_merge_to_the_checkpoint(saved: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    from autotp_plan.planner.shards.merge import check_shards, merge

    work, _ = saved
    check_shards(work / name / "untrained")
    merge(work / name / "untrained", tmp_path / "merged")
    original = work / name / "whole"
    assert {path.name for path in original.iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}
    for path in original.iterdir():
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_are_saved_when_those_that_are_mapped_were_replaced(saved: tuple[Path, Any]) -> None:
    work, _ = saved
    expected, found = work / REPLACED / "untrained", work / REPLACED / "untrained, another folder"
    assert (work / REPLACED / "mapped" / "autotp_plan.json").read_bytes() != (found / "autotp_plan.json").read_bytes()
    assert {path.name for path in expected.iterdir()} == {path.name for path in found.iterdir()}
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", JOBS)
def test_trained_shards_merge_to_the_trained_model(saved: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from autotp_plan.planner.shards.merge import check_shards, merge
    from tests.helpers.models import batch, load_dense

    work, losses = saved
    check_shards(work / name / "trained")
    merge(work / name / "trained", tmp_path / "merged")
    tokens = batch(77)
    with torch.no_grad():
        before, after = (
            load_dense(folder)(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
            for folder in (work / name / "whole", tmp_path / "merged")
        )
    assert after == pytest.approx(losses[name], rel=1e-6)
    assert abs(before / after - 1) > 1e-3, "two steps should have changed the loss"
    if name == "tied and stored":
        tensors = {
            key: value for path in (tmp_path / "merged").glob("*.safetensors") for key, value in load_file(path).items()
        }
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        assert all(torch.equal(tensors[name], torch.arange(77)) for name in TABLES)


@pytest.mark.parametrize("name", JOBS)
def test_trained_shards_are_resharded_by_the_rules_of_their_plan(
    saved: tuple[Path, Any], name: str, tmp_path: Path
) -> None:
    from autotp_plan.planner import compile_plan, merge, reshard
    from autotp_plan.schemas.plan.document import Plan
    from tests.helpers.random_shards import files_of

    work, _ = saved
    tp_size = 4 if JOBS[name][2] == 2 and name != "tied and stored" else 2
    trained = work / name / "trained"
    reshard(trained, tmp_path / "new", tp_size=tp_size)
    plan = compile_plan(work / name / "whole", tp_size=tp_size, uneven=name == "tied and stored", specs=specs_of(name))
    found = Plan.read(tmp_path / "new" / "autotp_plan.json")
    assert (found, found.rules) == (plan, plan.rules)
    for folder in (trained, tmp_path / "new"):
        merge(folder, tmp_path / f"merged {folder.name}")
    assert files_of(tmp_path / "merged new") == files_of(tmp_path / "merged trained")


def dies_and_saves_again(work: Path) -> list[str]:
    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.checkpoint import save_shards
    from autotp_plan.runtime.loading.weights import open_weights
    from autotp_plan.schemas.errors import OutputError, ShardsError

    plan = load_plan(work / "plan.json")
    model = plan.load_model(work / "shards")
    said = []

    def attempt(folder: str) -> None:
        try:
            plan.save_shards(model, work / folder)
            said.append("saved")
        except OutputError as error:
            said.append(f"{error.faults[0].what}: {error.faults[0].got}")

    write = save_shards._write
    if plan.ranks.tp_rank == 1:

        def full(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        save_shards._write = full  # type: ignore[assignment]
    attempt("again")
    save_shards._write = write
    if plan.ranks.tp_rank == 0:
        try:
            open_weights(work / "again", plan.document)
        except ShardsError as error:
            said.append(error.faults[0].got)
    attempt("again")
    attempt("again")
    attempt("whole")
    return said


def test_a_save_that_fails_is_not_loaded_and_can_be_done_again(saved: tuple[Path, Any]) -> None:
    work, _ = saved
    first, second = launch(dies_and_saves_again, 2, work / "fused and grouped", timeout=100)
    full = "the shards of a running job could not be written: No space left on device"
    refused = "save_shards cannot write here: a folder that is not empty: "
    finished = refused + "autotp_plan.json, autotp_shards.json, autotp_source_index.json"
    assert first[:4] == [full, "shards without autotp_shards.json", "saved", finished]
    assert first[4].startswith(refused) and "safetensors" in first[4], "a checkpoint is not written over"
    assert second == [full, *first[2:]]
