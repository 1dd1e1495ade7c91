"""Models that are no causal language models, with a head that scores or with none: equal to the dense one.

Reward models are `...ForSequenceClassification` with one label.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.schemas.errors import CompileError
from tests.helpers.launch import launch
from tests.helpers.models import CONFIGS, batch, eager_experts, make_config

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "reward", "no head")
VARIANTS = ("llama", "qwen2", "gemma2", "gpt2", "mistral", "phi3", "opt", "bloom", "mixtral", "gpt_neox",
            "falcon_alibi", "deepseek_v3")  # fmt: skip
LACKING = {"phi3 QuestionAnswering", "gemma2 QuestionAnswering", "opt TokenClassification",
           "deepseek_v3 QuestionAnswering"}  # fmt: skip
"""What transformers has no class for."""
CASES = [f"{variant} {task}" for variant in VARIANTS for task in TASKS if f"{variant} {task}" not in LACKING]
TOLERANCE = 1e-9
PLANTED = "planted"


def auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, {"no head": "AutoModel", "reward": "AutoModelForSequenceClassification"}.get(
        task, f"AutoModelFor{task}"))  # fmt: skip


def save_model(folder: Path, case: str, **changes: Any) -> Any:
    """A random checkpoint of a class in float64."""
    from autotp_plan.runtime.verify.random_inputs import randomise

    variant, _, task = case.partition(" ")
    config = make_config(variant, num_labels=1 if task == "reward" else 3, classifier_dropout=0.0, **changes)
    model = auto_class(task).from_config(config).double()
    randomise(model)
    model.save_pretrained(folder)
    return model


def gradients_of(folder: Path, case: str) -> Any:
    """The dense model's loss, logits and gradients."""
    import torch

    from autotp_plan.runtime.verify.float64_passes import by_class, dense_reader, run_passes

    model = auto_class(case.partition(" ")[2]).from_pretrained(folder, **eager_experts(torch.float64)).double().train()
    return run_passes(
        model, dense_reader(model), [name for name, _ in model.named_parameters()], batch, forward=by_class
    )


def compare(work: Path) -> dict[str, dict[str, float]]:
    """Inside a rank: by case the errors of loss, logits and gradients."""
    import torch

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.verify.float64_passes import by_class
    from tests.helpers import parity

    found = {}
    for case in CASES:
        plan = load_plan(work / f"{case}.json")
        folder = work / case / ("shards" if case.endswith("reward") else "")
        model = plan.load_model(folder, dtype=torch.float64, **eager_experts(torch.float64)).train()
        found[case] = parity.errors_against(torch.load(work / f"{case}.dense"), model, plan, by_class)
        if case == "llama reward":
            model.zero_grad()
            found[PLANTED] = parity.errors_against(torch.load(work / f"{PLANTED}.dense"), model, plan, by_class)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """The largest errors of any rank, by case."""
    import torch

    work = tmp_path_factory.mktemp("classes")
    for case in CASES:
        save_model(work / case, case)
        plan = compile_plan(work / case, tp_size=2)
        (work / f"{case}.json").write_text(plan.to_json())
        if case.endswith("reward"):
            presplit(plan, work / case, work / case / "shards")
        torch.save(gradients_of(work / case, case), work / f"{case}.dense")
    plant_another_head(work)
    first, second = launch(compare, 2, work)
    return {case: {key: max(error, second[case][key]) for key, error in first[case].items()} for case in first}


def plant_another_head(work: Path) -> None:
    """The dense numbers of a head whose gradient was summed over the two ranks, which have all of it."""
    import torch

    dense = torch.load(work / "llama reward.dense")
    dense["gradient"]["score.weight"] *= 2
    torch.save(dense, work / f"{PLANTED}.dense")


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_equal_the_dense_models(found: dict[str, dict[str, float]], case: str) -> None:
    errors = found[case]
    assert any(key.startswith("gradient") for key in errors) and any(key.startswith("logits") for key in errors)
    assert {key: error for key, error in errors.items() if not error < TOLERANCE} == {}


@pytest.mark.distributed
@pytest.mark.timeout(270)
def test_a_planted_error_of_a_head_is_found(found: dict[str, dict[str, float]]) -> None:
    wrong = {key for key, error in found[PLANTED].items() if not error < TOLERANCE}
    assert wrong == {"gradient score.weight"}


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_preset_plans_a_bare_model_as_its_causal_model(tmp_path: Path, variant: str) -> None:
    """The layers are sharded in the same way, under their own names; the head is gone."""
    from transformers import AutoModelForCausalLM

    def layouts(plan: Any, prefix: str) -> dict[str, Any]:
        return {
            entry.name.removeprefix(prefix): (plan.layouts[entry.layout], entry.style, entry.partial_gradient)
            for entry in plan.expanded()
            if not entry.name.startswith("lm_head")
        }

    bare = save_model(tmp_path / "bare", f"{variant} no head")
    AutoModelForCausalLM.from_config(bare.config).save_pretrained(tmp_path / "causal")
    plan, causal = (compile_plan(tmp_path / name, tp_size=2) for name in ("bare", "causal"))
    assert layouts(plan, "") == layouts(causal, f"{bare.base_model_prefix}.")
    assert not plan.tied and any(f"names {type(bare).__name__}, a model without a head" in note for note in plan.notes)


@pytest.mark.parametrize("case", ["llama SequenceClassification", "gpt2 TokenClassification", "llama no head"])
def test_a_config_alone_and_a_module_plan_the_same(tmp_path: Path, case: str) -> None:
    model = save_model(tmp_path, case)
    plan = compile_plan(tmp_path, tp_size=2).to_json()
    assert compile_plan(model, tp_size=2).to_json() == plan
    (tmp_path / "model.safetensors").unlink()
    assert compile_plan(tmp_path, tp_size=2).to_json() == plan


def test_a_class_of_another_checkpoint_is_refused_and_its_next_step_works(tmp_path: Path) -> None:
    from tests.helpers.models import save_checkpoint

    folder = save_checkpoint(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    right = compile_plan(folder, tp_size=2)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(CompileError) as caught:
        compile_plan(folder, tp_size=2)
    assert "got:      LlamaModel, and a tensor model.embed_tokens.weight" in str(caught.value)
    assert "such as LlamaForCausalLM, in `architectures`" in str(caught.value)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert compile_plan(folder, tp_size=2) == right


def test_a_head_that_no_preset_knows_is_refused_with_the_rule_to_add(tmp_path: Path) -> None:
    """The rule that it proposes plans the model."""
    import torch
    from safetensors.torch import load_file, save_file

    from autotp_plan.planner import SpecFile

    save_model(tmp_path, "llama reward")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["v_head.weight"] = torch.zeros(1, 64)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompileError, match=r"no rule decides a weight\n  where:    v_head\.weight") as caught:
        compile_plan(tmp_path, tp_size=2)
    rule = str(caught.value).partition("add a rule: ")[2].partition(" replicates")[0]
    plan = compile_plan(tmp_path, tp_size=2, specs=[SpecFile.from_dict({"layer_specs": [json.loads(rule)]})])
    assert {entry.style for entry in plan.expanded() if "head" in entry.name} == {"replicated"}


@pytest.mark.distributed
@pytest.mark.timeout(500)
@pytest.mark.parametrize("case", ["llama SequenceClassification", "llama TokenClassification"])
def test_verify_proves_a_plan_of_a_head(tmp_path: Path, case: str) -> None:
    from autotp_plan.runtime.verify.run import verify_plan

    save_model(tmp_path, case)
    proof = verify_plan(compile_plan(tmp_path, tp_size=2), attention=("eager",))
    assert proof.proven, proof.failure
    assert "score.weight" in proof.float64["eager"]["gradient"]
