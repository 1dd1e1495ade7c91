"""The usual calls that save a model write all of it from a sharded one, or are refused with what to call instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

JOBS: dict[str, tuple[str, dict[str, Any], int, int, str]] = {  # variant, changes, TP size, ZeRO stage, dtype
    "fused and grouped": ("phi3", {}, 2, 1, "float32"),
    "shared in part": ("phi3", {}, 4, 0, "float32"),
    "experts": ("mixtral", {}, 2, 3, "float32"),
    "shared in part, bf16": ("phi3", {"num_key_value_heads": 2}, 4, 0, "bfloat16"),
    "tied": ("llama_bias_tied", {"num_attention_heads": 8, "vocab_size": 257}, 2, 3, "float32"),
    "rows": ("gpt2", {}, 2, 2, "bfloat16"),
}


def settings_of(stage: int, dtype: str) -> dict[str, Any]:
    from tests.helpers.parity import engine_settings

    return {**engine_settings(stage), **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {})}


def save_in_every_way(work: Path, tp_size: int) -> dict[str, list[str]]:
    """Save untrained and trained models; what the rest said, by job."""
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import batch

    said: dict[str, list[str]] = {}
    for name, (_, _, size, stage, dtype) in JOBS.items():
        if size != tp_size:
            continue
        out = work / name
        plan = load_plan(out / "plan.json")
        model: Any = plan.load_model(out / ("shards" if stage % 2 else "whole"), dtype=getattr(torch, dtype)).train()
        model.save_pretrained(out / "untrained", max_shard_size="60KB")
        model.save_pretrained(out / "module names", save_original_format=False)
        engine, *_ = plan.initialize(model, config=settings_of(stage, dtype))
        engine.module.save_pretrained(out / "before", safe_serialization=True)
        for step in range(2):
            tokens = batch(10 * step + plan.ranks.dp_rank)
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()
        plan.save_shards(engine, out / "trained shards")
        engine.module.save_pretrained(out / "trained", variant=None)
        assert engine.save_16bit_model(str(out), "all.bin")
        assert engine.save_fp16_model(str(out), "again.bin")
        said[name] = []
        engine.destroy()
    return said


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from autotp_plan.planner import compile_plan, presplit
    from tests.helpers.models import save_checkpoint

    work = tmp_path_factory.mktemp("saving")
    for name, (variant, changes, tp_size, _, dtype) in JOBS.items():
        folder = save_checkpoint(work / name / "whole", variant, dtype=getattr(torch, dtype), **changes)
        plan = compile_plan(folder, tp_size=tp_size, uneven="vocab_size" in changes)
        (work / name / "plan.json").write_text(plan.to_json())
        presplit(plan, folder, work / name / "shards")
    for size in (2, 4):
        launch(save_in_every_way, 4, work, size, timeout=150)
    return work


def tensors(folder: Path) -> dict[str, Any]:
    """The state dict of the unsharded model that transformers loads from a folder."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    import torch

    same = [key for key in first if key in second and first[key].dtype == second[key].dtype]
    return set(first) == set(second) == set(same) and all(torch.equal(first[key], second[key]) for key in same)


@pytest.mark.parametrize("name", JOBS)
def test_an_untrained_model_is_saved_as_it_was(work: Path, name: str) -> None:
    original = tensors(work / name / "whole")
    for saved in ("untrained", "before", "module names"):
        assert equal(tensors(work / name / saved), original), saved
    assert not equal(tensors(work / name / "trained"), original)


@pytest.mark.parametrize("name", JOBS)
def test_the_files_are_those_that_an_unsharded_model_saves(work: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from autotp_plan.schemas.storage.checkpoint import read_checkpoint

    dense = AutoModelForCausalLM.from_pretrained(work / name / "whole", dtype="auto")
    for saved, options in (("before", {}), ("module names", {"save_original_format": False})):
        theirs = tmp_path / saved
        dense.save_pretrained(theirs, **options)
        ours = work / name / saved
        assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
        for file in ("config.json", "generation_config.json"):
            assert (ours / file).read_text() == (theirs / file).read_text()
        first, second = (
            {key: (one.dtype, one.shape) for key, one in read_checkpoint(folder).tensors.items()}
            for folder in (ours, theirs)
        )
        assert first == second
    assert len(read_checkpoint(work / name / "untrained").files) > 3


@pytest.mark.parametrize("name", JOBS)
def test_a_trained_model_is_saved_as_it_is(work: Path, name: str, tmp_path: Path) -> None:
    import torch

    from autotp_plan.planner.shards.merge import merge

    merge(work / name / "trained shards", tmp_path / "merged")
    trained = tensors(work / name / "trained")
    assert equal(trained, tensors(tmp_path / "merged"))
    for file in ("all.bin", "again.bin"):
        state = torch.load(work / name / file, weights_only=True)
        assert equal(state, {key: trained[key] for key in state})
        assert set(trained) - set(state) == set()


def save_transposed(work: Path) -> dict[str, Any]:
    """Save a model whose experts are transposed on disk, from there and from shards; load what was saved."""
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    plan = TrainingPlan(compile_plan(work / "published", tp_size=2))
    model: Any = plan.load_model(work / "published")
    model.save_pretrained(work / "saved", max_shard_size="60KB")
    shards: Any = plan.load_model(work / "shards")
    shards.save_pretrained(work / "from shards")
    again = TrainingPlan(compile_plan(work / "saved", tp_size=2)).load_model(work / "saved")
    return {"published": local(model), "shards": local(shards), "saved": local(again)}


def local(model: Any) -> dict[str, Any]:
    """This rank's parameters."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_tensors_that_are_transposed_on_disk(tmp_path: Path) -> None:
    """Experts of Qwen3-VL-MoE are saved in the shapes of the modules, as transformers does, and planned from there."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    from autotp_plan.planner import compile_plan, presplit
    from autotp_plan.planner.shards.merge import merge
    from tests.planner.wrappers.test_published_weights import published_experts, transposed

    _, published = published_experts(tmp_path)
    plan = compile_plan(published, tp_size=2)
    assert len(transposed(plan)) == 4
    presplit(plan, published, tmp_path / "shards")
    for found in launch(save_transposed, 2, tmp_path):
        assert equal(found["published"], found["saved"]) and equal(found["published"], found["shards"])
    AutoModelForImageTextToText.from_pretrained(published).save_pretrained(tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3 and equal(dense, {key: one for path in files for key, one in load_file(path).items()})
    assert equal(dense, load_file(tmp_path / "from shards" / "model.safetensors"))
    again = compile_plan(tmp_path / "saved", tp_size=2)
    assert not transposed(again) and again.layouts == plan.layouts
    with pytest.raises(MismatchError, match="a tensor is not what the plan says"):
        presplit(plan, tmp_path / "saved", tmp_path / "wrong")
    # `merge` has no model to ask: it gives the bytes of the checkpoint back
    merge(tmp_path / "shards", tmp_path / "merged")
    source, merged = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "merged"))
    assert equal(source, merged)
    assert equal(dense, {name: one.mT if name in transposed(plan) else one for name, one in source.items()})
