"""The life of a checkpoint: split, merged and resharded, whatever the layouts, every byte is where it was."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotp_plan.planner import check_shards, compile_plan, merge, presplit, reshard
from autotp_plan.planner.copying import copy_engine
from autotp_plan.schemas import documents
from autotp_plan.schemas.errors import MismatchError, ShardsError
from autotp_plan.schemas.shards.manifest import Owner
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.checkpoints import LLAMA_CONFIG, llama_shapes, write_checkpoint, write_llama
from tests.helpers.random_shards import files_of, random_model, random_plan, write_random

pytestmark = pytest.mark.sweep

SETTINGS = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@SETTINGS
@given(
    random=st.randoms(use_true_random=False),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    chunk=st.sampled_from([1, 7, 16, 50, 1 << 20]),
    most=st.sampled_from([20, 100, 1 << 30]),
    workers=st.sampled_from([1, 1, 3]),
)
def test_merge_and_reshard_give_every_byte_back(
    random: Random, sizes: tuple[int, int], chunk: int, most: int, workers: int
) -> None:
    model = random_model(random)
    old, new = (random_plan(model, size, random) for size in sizes)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_engine, "CHUNK_BYTES", chunk)
        work = Path(name)
        original = write_random(model, work / "original", random)
        options: Any = {"max_file_bytes": most, "workers": workers}
        presplit(old, original, work / "old", **options)
        merge(work / "old", work / "merged", workers=workers)
        assert files_of(work / "merged") == files_of(original)
        reshard(work / "old", work / "new", plan=new, **options)
        presplit(new, original, work / "fresh", **options)
        assert files_of(work / "new") == files_of(work / "fresh")
        check_shards(work / "new")
        merge(work / "new", work / "again", workers=workers)
        assert files_of(work / "again") == files_of(original)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("old_size", [1, 2, 4])
def test_reshard_by_the_preset(tmp_path: Path, old_size: int, tp_size: int) -> None:
    """Uneven (3 of 4 KV heads) and replicated (8 of 4) included: as compiled and split from the checkpoint."""
    original = write_llama(tmp_path / "original", biases=False, num_files=2)
    uneven = tp_size == 3
    presplit(compile_plan(original, tp_size=old_size), original, tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", tp_size=tp_size, uneven=uneven)
    presplit(compile_plan(original, tp_size=tp_size, uneven=uneven), original, tmp_path / "fresh")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "fresh")
    merge(tmp_path / "new", tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(original)


def test_a_plan_by_a_spec_file_is_asked_for(tmp_path: Path) -> None:
    """Where it does not remember its rules: plans of 0.1.0 do not."""
    original = write_llama(tmp_path / "original")
    spec = SpecFile.from_dict({"layer_specs": [{"patterns": [r".*lm_head\.weight$"], "partition_type": "skip"}]})
    presplit(replace(compile_plan(original, tp_size=2, specs=[spec]), rules=None), original, tmp_path / "old")
    with pytest.raises(MismatchError) as caught:
        reshard(tmp_path / "old", tmp_path / "new", tp_size=4)
    (fault,) = caught.value.faults
    assert "spec" in fault.got and "--plan" in fault.next
    assert not (tmp_path / "new").exists()
    plan = compile_plan(original, tp_size=4, specs=[spec])
    reshard(tmp_path / "old", tmp_path / "new", plan=plan)
    presplit(plan, original, tmp_path / "fresh")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "fresh")


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    original, other = write_llama(tmp_path / "original"), write_llama(tmp_path / "other", vocab_size=128)
    presplit(compile_plan(original, tp_size=2), original, tmp_path / "old")
    with pytest.raises(MismatchError, match="a tensor is not what the plan says"):
        reshard(tmp_path / "old", tmp_path / "new", plan=compile_plan(other, tp_size=2))


def test_tensors_that_no_rank_reads_come_back(tmp_path: Path) -> None:
    """A tied head that is on disk all the same, and a table that is no parameter."""
    shapes = {**llama_shapes(), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    original = write_checkpoint(tmp_path / "original", shapes, config, num_files=2, tied=tied)
    plan = compile_plan(original, tp_size=2)
    assert [tie.name for tie in plan.tied] == ["lm_head.weight"]
    manifest = presplit(plan, original, tmp_path / "shards")
    (unused,) = [file.name for file in manifest.files if file.owner is Owner.NO_RANK]
    assert unused == "unused.00001-of-00001.safetensors"
    merge(tmp_path / "shards", tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(original)


def test_a_head_that_is_not_tied_to_the_embedding_is_resharded(tmp_path: Path) -> None:
    """The config ties it, and its values are others; in a plan for another TP size it is a parameter still."""
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    original = write_checkpoint(tmp_path / "original", llama_shapes(), config)
    presplit(compile_plan(original, tp_size=2), original, tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", tp_size=4)
    presplit(compile_plan(original, tp_size=4), original, tmp_path / "fresh")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "fresh")
    merge(tmp_path / "new", tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(original)


def test_transformers_loads_what_was_merged(tmp_path: Path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **{key: value for key, value in LLAMA_CONFIG.items() if key not in ("architectures", "model_type")}
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    presplit(compile_plan(tmp_path / "original", tp_size=2), tmp_path / "original", tmp_path / "shards")
    merge(tmp_path / "shards", tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "original")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for (name, one), (_, other) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(one, other), name


def test_a_manifest_whose_original_is_another(tmp_path: Path) -> None:
    original = write_llama(tmp_path / "original")
    presplit(compile_plan(original, tp_size=2), original, tmp_path / "shards")
    path = tmp_path / "shards" / "autotp_shards.json"
    data = json.loads(path.read_text())
    header = json.loads(data["source"]["files"][0]["header"])
    header["other"] = header.pop("model.norm.weight")
    data["source"]["files"][0]["header"] = json.dumps(header)
    data["fingerprint"] = documents.fingerprint({key: data[key] for key in data if key != "fingerprint"})
    path.write_text(json.dumps(data))
    for run in (lambda: merge(tmp_path / "shards", tmp_path / "out"), lambda: check_shards(tmp_path / "shards")):
        with pytest.raises(ShardsError, match="do not make up the checkpoint"):
            run()
    assert not (tmp_path / "out").exists()
