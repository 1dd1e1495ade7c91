"""A config that ties the head, and a checkpoint with a head of other values: not tied, as `from_pretrained` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import check_checkpoint, compile_plan, merge, presplit
from autotp_plan.schemas.errors import AutoTPError
from tests.helpers.launch import launch
from tests.helpers.models import eager_experts, load_dense, save_checkpoint

VARIANTS = ("llama_bias_tied", "gpt2", "gemma2")


def store_a_head(folder: Path, *, equal: bool) -> None:
    """Add the head to a checkpoint of one file that leaves it out: the embedding once more, or other values."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (embedding,) = (value for name, value in tensors.items() if "embed_tokens" in name or "wte" in name)
    head = embedding.clone()
    if not equal:
        head[-1, -1] += 1e-3  # the last element is enough
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By variant a checkpoint with another head, its plan, its shards, and `VARIANT.tied.json`, the plan without."""
    import torch

    from tests.helpers import parity

    work = tmp_path_factory.mktemp("head")
    for variant in VARIANTS:
        save_checkpoint(work / f"{variant}.many", variant)
        dense: Any = load_dense(work / f"{variant}.many")
        dense.save_pretrained(work / variant)
        (work / f"{variant}.tied.json").write_text(compile_plan(work / variant, tp_size=2).to_json())
        store_a_head(work / variant, equal=False)
        plan = compile_plan(work / variant, tp_size=2)
        (work / f"{variant}.json").write_text(plan.to_json())
        presplit(plan, work / variant, work / f"{variant}.shards")
        kept: Any = load_dense(work / variant, torch.float64, **eager_experts(torch.float64))
        assert kept.config.tie_word_embeddings, "what is tested"
        assert kept.lm_head.weight is not kept.get_input_embeddings().weight
        torch.save(parity.gradients(kept), work / f"{variant}.dense")
    return work


def test_a_head_of_its_own_is_planned_and_merged_back(work: Path, tmp_path: Path) -> None:
    for variant in VARIANTS:
        plan = compile_plan(work / variant, tp_size=2)
        head = next(entry for entry in plan.expanded() if entry.name == "lm_head.weight")
        assert plan.tied == () and (head.style, head.gather_output) == ("column", True)
        assert any(note.startswith("lm_head.weight has other values on disk than ") for note in plan.notes)
        assert compile_plan(load_dense(work / variant), tp_size=2).parameters == plan.parameters, "of a live module"
        merge(work / f"{variant}.shards", tmp_path / variant)
        merged = (tmp_path / variant / "model.safetensors").read_bytes()
        assert merged == (work / variant / "model.safetensors").read_bytes()


def test_a_head_that_is_stored_twice_stays_tied(tmp_path: Path) -> None:
    dense: Any = load_dense(save_checkpoint(tmp_path / "many", "llama_bias_tied"))
    dense.save_pretrained(tmp_path / "one")
    store_a_head(tmp_path / "one", equal=True)
    plan = compile_plan(tmp_path / "one", tp_size=2)
    assert [tie.name for tie in plan.tied] == ["lm_head.weight"] and check_checkpoint(plan, tmp_path / "one") == []


def test_a_plan_that_ties_is_refused_and_compiling_again_works(work: Path, tmp_path: Path) -> None:
    """By `check`, presplit and loading."""
    from autotp_plan.runtime.loading.weights import open_weights
    from autotp_plan.schemas.plan.document import Plan

    for variant in VARIANTS:
        tied = Plan.read(work / f"{variant}.tied.json")
        (fault,) = check_checkpoint(tied, work / variant)
        assert fault.code == "tied-values-differ" and fault.next.startswith("compile a plan for this checkpoint")
        for refused in (
            lambda plan, folder: presplit(plan, folder, tmp_path / "shards"),
            lambda plan, folder: open_weights(folder, plan),
        ):
            with pytest.raises(AutoTPError, match="the plan ties a tensor that has values of its own"):
                refused(tied, work / variant)
        assert check_checkpoint(Plan.read(work / f"{variant}.json"), work / variant) == []


def compare(work: Path) -> dict[str, Any]:
    """Inside a rank: differences of the loaded model, and the errors of its numbers."""
    import torch

    from autotp_plan.runtime import load_plan
    from tests.helpers import parity
    from tests.runtime.loading.test_equals_from_pretrained import differences

    found: dict[str, Any] = {}
    for variant in VARIANTS:
        plan = load_plan(work / f"{variant}.json")
        for folder in (variant, f"{variant}.shards"):
            model: Any = plan.load_model(work / folder, dtype=torch.bfloat16)
            model.tie_weights()  # what the config says, and the plan does not
            found[folder] = differences(model, load_dense(work / variant, torch.bfloat16), plan)
        model = plan.load_model(work / variant, dtype=torch.float64, **eager_experts(torch.float64)).train()
        dense = torch.load(work / f"{variant}.dense")
        found[f"{variant} errors"] = parity.errors_against(dense, model, plan)
        with torch.no_grad():  # planted: the head is the embedding after all
            embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
            model.get_parameter("lm_head.weight").copy_(model.get_parameter(f"{embedding}.weight"))
        model.zero_grad()
        found[f"{variant} planted"] = parity.errors_against(dense, model, plan)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_loaded_model_and_its_gradients_equal_the_dense_ones(work: Path) -> None:
    for found in launch(compare, 2, work):
        for variant in VARIANTS:
            assert found[variant] == found[f"{variant}.shards"] == []
            assert max(found[f"{variant} errors"].values()) < 1e-9
            assert "gradient lm_head.weight" in found[f"{variant} errors"]
            assert max(found[f"{variant} planted"].values()) > 1e-9


@pytest.mark.distributed
@pytest.mark.timeout(500)
def test_verify_proves_it(work: Path) -> None:
    from autotp_plan.runtime.verify.run import verify_plan
    from autotp_plan.schemas.plan.document import Plan

    proof = verify_plan(Plan.read(work / "llama_bias_tied.json"), attention=("eager",))
    assert proof.proven, proof.failure
    assert "lm_head.weight" in proof.float64["eager"]["gradient"]
