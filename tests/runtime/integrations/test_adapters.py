"""An adapter's life on a sharded model: loaded, one of several, merged, saved; and what PEFT's own calls do there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import AutoTPError, CheckpointError, MismatchError
from tests.helpers.launch import launch
from tests.runtime.integrations.test_lora import lora_config, randomise_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore:.*target_modules:UserWarning"),
]

OTHER = {"r": 2, "target_modules": ["o_proj", "gate_proj"], "use_rslora": True, "rank_pattern": {"gate_proj": 6}}


def prepare(folder: Path) -> dict[str, Any]:
    """A checkpoint, two adapters for it made by PEFT, and what the unsharded model does with them."""
    import torch
    from peft import PeftModel, get_peft_model

    from tests.helpers.models import load_dense, save_checkpoint

    save_checkpoint(folder / "checkpoint", "llama")
    for number, options in enumerate(({}, OTHER)):
        torch.manual_seed(number)
        model = get_peft_model(load_dense(folder / "checkpoint"), lora_config(**options))
        randomise_adapter(model)
        model.save_pretrained(str(folder / f"adapter{number}"), save_embedding_layers=False)
    wanted: dict[str, Any] = {}
    model = PeftModel.from_pretrained(load_dense(folder / "checkpoint"), str(folder / "adapter0"), is_trainable=True)
    wanted["first"] = loss_of(model)
    wanted["trained"] = steps(model)
    wanted["state"] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_adapter(str(folder / "adapter1"), "second")
    model.set_adapter("second")
    wanted["second"] = loss_of(model)
    with model.disable_adapter():
        wanted["none"] = loss_of(model)
    model = PeftModel.from_pretrained(load_dense(folder / "checkpoint"), str(folder / "adapter0"))
    model.merge_and_unload().save_pretrained(str(folder / "merged"))
    linear = get_peft_model(load_dense(folder / "checkpoint"), lora_config(target_modules="all-linear"))
    wanted["all-linear"] = sorted(linear.peft_config["default"].target_modules)
    return wanted


def loss_of(model: Any) -> float:
    import torch

    from tests.helpers.models import batch

    with torch.no_grad():
        return model(input_ids=batch(7), labels=batch(7)).loss.item()


def steps(model: Any) -> list[float]:
    """Two steps of SGD on what is trainable."""
    import torch

    from tests.helpers.models import batch

    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    losses = []
    for step in range(2):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def refusal(call: Any) -> tuple[str, str]:
    try:
        call()
    except AutoTPError as error:
        return error.faults[0].what, error.faults[0].next
    return "nothing", ""


def in_two_ranks(folder: Path) -> dict[str, Any]:
    import peft
    from peft import PeftModel, get_peft_model

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan

    plan = TrainingPlan(compile_plan(folder / "checkpoint", tp_size=2))
    found: dict[str, Any] = {}

    def load() -> Any:
        return plan.load_model(folder / "checkpoint").train()

    model = plan.load_adapter(load(), folder / "adapter0")
    found["first"] = loss_of(model)
    engine, _, _, _ = plan.initialize(
        model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "gradient_clipping": 0.0,
        },
    )
    from tests.helpers.models import batch

    losses = []
    for step in range(2):
        loss = engine(input_ids=batch(step), labels=batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found["trained"] = losses
    refused = {"save_shards": refusal(lambda: plan.save_shards(engine, folder / "shards"))}
    found["left behind"] = (folder / "shards").exists()
    assert plan.load_adapter(model, folder / "adapter1", name="second", is_trainable=False) is model
    found["second"] = loss_of(model)
    with model.disable_adapter():
        found["none"] = loss_of(model)
    plan.save_adapter(engine, folder / "saved")
    engine.destroy()

    merged = plan.load_adapter(load(), folder / "adapter0")
    merged.merge_adapter()
    found["merged"] = loss_of(merged)
    merged.unmerge_adapter()
    found["unmerged"] = loss_of(merged)
    plan.save_shards(merged.merge_and_unload(), folder / "shards")

    found["from_pretrained"] = loss_of(PeftModel.from_pretrained(load(), str(folder / "adapter0")))
    direct = get_peft_model(load(), lora_config(target_modules="all-linear"))
    found["all-linear"] = sorted(direct.peft_config["default"].target_modules)
    found["trainable"] = sum(one.numel() for one in direct.parameters() if one.requires_grad)

    kinds = {
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "LoHa": peft.LoHaConfig(target_modules=["q_proj"]),
        "DoRA": lora_config(use_dora=True),
        "embeddings": lora_config(target_modules=["embed_tokens"]),
        "head": lora_config(modules_to_save=["lm_head"]),
    }
    for name, config in kinds.items():
        refused[name] = refusal(lambda config=config: get_peft_model(load(), config))
        refused[f"add_lora {name}"] = refusal(lambda config=config: plan.add_lora(load(), config))
    refused["transformers add"] = refusal(lambda: load().add_adapter(lora_config()))
    refused["transformers load"] = refusal(lambda: load().load_adapter(str(folder / "adapter0")))
    with pytest.raises(CheckpointError, match="there is no adapter to load"):
        plan.load_adapter(load(), folder)
    found["refused"] = refused
    return found


@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.upstream
def test_adapters_are_loaded_trained_merged_and_saved_as_on_the_unsharded_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from autotp_plan.planner import merge
    from tests.helpers.models import load_dense

    wanted = prepare(tmp_path)
    for found in launch(in_two_ranks, 2, tmp_path):
        for name in ("first", "second", "none", "trained"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
        for name in ("merged", "unmerged", "from_pretrained"):
            assert found[name] == pytest.approx(wanted["first"], rel=1e-5), name
        assert abs(found["first"] - found["none"]) > 1e-3, "the adapter does something"
        assert found["all-linear"] == wanted["all-linear"]
        assert not found["left behind"]
        refused = found["refused"]
        assert refused.pop("save_shards")[0] == "a model with adapters is not the model of the plan"
        assert "merge_and_unload" in found["refused"].get("save_shards", ("", "merge_and_unload"))[1]
        for name in ("IA3", "prompt", "LoHa"):
            for way in (name, f"add_lora {name}"):
                what, instead = refused.pop(way)
                assert what == "an adapter of this kind is not supported for a tensor-parallel model", way
                assert "plan.add_lora" in instead
        for name in ("DoRA", "head"):
            for way in (name, f"add_lora {name}"):
                assert refused.pop(way)[0] == "a LoRA option is not supported for a tensor-parallel model", way
        for way in ("embeddings", "add_lora embeddings"):
            assert refused.pop(way)[0] == "a module cannot have a LoRA adapter under tensor parallelism"
        assert "plan.add_lora" in refused.pop("transformers add")[1]
        assert "plan.load_adapter" in refused.pop("transformers load")[1]
        assert not refused

    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): value for name, value in wanted["state"].items() if "lora_" in name}
    assert saved.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)
    second = load_file(tmp_path / "saved" / "second" / "adapter_model.safetensors")
    original = load_file(tmp_path / "adapter1" / "adapter_model.safetensors")
    assert second.keys() == original.keys()
    assert all(torch.equal(second[name], value) for name, value in original.items())
    again = PeftModel.from_pretrained(load_dense(tmp_path / "checkpoint"), str(tmp_path / "saved" / "second"))
    assert loss_of(again) == pytest.approx(wanted["second"], rel=1e-5)

    merge(tmp_path / "shards", tmp_path / "rejoined")
    ours, theirs = load_dense(tmp_path / "rejoined").state_dict(), load_dense(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from types import SimpleNamespace

    from autotp_plan.runtime.integrations.lora import _check_tensors

    adapted = SimpleNamespace(named_parameters=lambda: [("base.q.lora_A.second.weight", None), ("base.q.weight", None)])
    _check_tensors(adapted, "second", {"base.q.lora_A.weight"}, tmp_path)
    with pytest.raises(MismatchError, match="the adapter is of another model") as caught:
        _check_tensors(adapted, "second", {"base.k.lora_A.weight"}, tmp_path)
    assert "1 tensors that the model has no place for, 1 missing" in str(caught.value)
