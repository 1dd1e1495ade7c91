"""Adapters on a head and on experts: trained by an engine and by Trainer, resumed, counted, merged, combined."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import AutoTPError
from tests.helpers.launch import launch
from tests.runtime.integrations.test_lora import lora_config, randomise_adapter

KINDS: dict[str, tuple[str, Any]] = {  # variant, targets
    "head": ("llama", ["q_proj", "lm_head"]),
    "tied head": ("llama_bias_tied", ["q_proj", "lm_head"]),
    "experts": ("qwen2_moe", "all-linear"),
    "latent attention": ("deepseek_v3", ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]),
}


def steps_of(model: Any, step: Callable[[Any], None]) -> list[float]:
    from tests.helpers.models import batch

    losses = []
    for number in range(3):
        loss = model(input_ids=batch(number), labels=batch(number), use_cache=False).loss
        step(loss)
        losses.append(loss.item())
    return losses


def dense(work: Path) -> dict[str, Any]:
    import torch
    from peft import get_peft_model

    from tests.helpers.models import batch, load_dense, save_checkpoint

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for kind, (variant, targets) in KINDS.items():
        save_checkpoint(work / kind, variant)
        torch.manual_seed(0)
        model = get_peft_model(load_dense(work / kind), lora_config(target_modules=targets))
        randomise_adapter(model)
        model.save_pretrained(str(work / kind / "adapter"), save_embedding_layers=False)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2, eps=1e-5)

        def step(loss: Any, optimizer: Any = optimizer) -> None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        found[kind] = [*steps_of(model, step), model.get_nb_trainable_parameters()]
        merged = model.merge_and_unload()
        with torch.no_grad():
            found[kind].append(merged(input_ids=batch(9), labels=batch(9)).loss.item())
        merged.save_pretrained(work / f"{kind} merged")
    found["trainer"] = trained(load_dense(work / "head"), work, None, get_peft_model)
    return found


def trained(model: Any, work: Path, stage: int | None, adapt: Callable[[Any, Any], Any], plan: Any = None) -> Any:
    """What a Trainer logs of two steps, and of two more that another one resumes."""
    import torch
    from transformers import Trainer, TrainingArguments

    from tests.helpers.trl import deepspeed_config, forget_accelerator, history
    from tests.runtime.calls.trainer_calls import samples

    logged = []
    out = work / f"trainer {stage}"
    copies = [model, copy.deepcopy(model)]
    for resume in (None, str(out / "checkpoint-2")):
        forget_accelerator()
        torch.manual_seed(0)
        adapted = adapt(copies.pop(), lora_config(init_lora_weights="gaussian"))
        arguments = TrainingArguments(
            str(out), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, use_cpu=True,
            report_to=[], save_strategy="steps", save_steps=2, disable_tqdm=True,
            deepspeed=None if stage is None else deepspeed_config(stage),
        )  # fmt: skip
        trainer = Trainer(adapted, arguments, train_dataset=samples())
        if plan is not None:
            plan.adapt_trainer(trainer)
        trainer.train(resume_from_checkpoint=resume)
        logged.append([entry["loss"] for entry in history(trainer) if "loss" in entry])
    return logged


def sharded(work: Path) -> dict[str, Any]:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan
    from tests.helpers.models import batch
    from tests.helpers.parity import engine_settings

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for number, kind in enumerate(KINDS):
        plan = TrainingPlan(compile_plan(work / kind, tp_size=2))
        model = plan.load_adapter(plan.load_model(work / kind).train(), work / kind / "adapter")
        settings = {**engine_settings(number % 3), "gradient_clipping": 0.0}
        settings["optimizer"] = {
            "type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01, "torch_adam": True}
        }  # fmt: skip
        engine, *_ = plan.initialize(model, config=settings)

        def step(loss: Any, engine: Any = engine) -> None:
            engine.backward(loss)
            engine.step()

        found[kind] = [*steps_of(engine, step), engine.module.get_nb_trainable_parameters()]
        merged = engine.module.merge_and_unload()
        found[kind].append(merged(input_ids=batch(9), labels=batch(9)).loss.item())
        merged.save_pretrained(work / f"{kind} merged by a plan")
        engine.destroy()
    plan = TrainingPlan(compile_plan(work / "head", tp_size=2))
    for stage in (1, 3):
        found[f"trainer {stage}"] = trained(plan.load_model(work / "head"), work, stage, plan.add_lora, plan)
    found["refused"] = refusals(plan, work)
    return found


def refusals(plan: Any, work: Path) -> dict[str, Any]:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan
    from tests.helpers.models import batch
    from tests.helpers.parity import engine_settings

    found: dict[str, Any] = {}

    def refusal(call: Callable[[], Any]) -> str:
        try:
            call()
        except AutoTPError as error:
            return str(error)
        return "not refused"

    latent = TrainingPlan(compile_plan(work / "latent attention", tp_size=2))
    with_experts = latent.load_model(work / "latent attention")
    found["all-linear"] = refusal(lambda: latent.add_lora(with_experts, lora_config(target_modules="all-linear")))
    crossing = lora_config(target_modules=["q_b_proj", "kv_a_proj_with_mqa"])
    found["crossing"] = refusal(lambda: latent.add_lora(with_experts, crossing))
    again = latent.add_lora(with_experts, lora_config(target_modules=["q_b_proj", "o_proj"]))  # as the refusal says
    found["of experts"] = again(input_ids=batch(9), labels=batch(9)).loss.item()
    copied = TrainingPlan(with_copied_output(compile_plan(work / "head", tp_size=2), "model.layers.0.mlp.down_proj"))
    in_the_middle = copied.load_model(work / "head")
    found["copied output"] = refusal(lambda: copied.add_lora(in_the_middle, lora_config(target_modules=["down_proj"])))
    others = lora_config(target_modules=r".*(layers\.1\.mlp\.down_proj|q_proj)")
    again = copied.add_lora(in_the_middle, others)  # as the refusal says
    found["without it"] = again(input_ids=batch(9), labels=batch(9)).loss.item()
    model = plan.load_adapter(plan.load_model(work / "head").train(), work / "head" / "adapter")
    engine, *_ = plan.initialize(model, config=engine_settings(3))
    found["merge_and_unload"] = refusal(model.merge_and_unload)
    found["merge_adapter"] = refusal(model.merge_adapter)
    found["deepcopy"] = refusal(lambda: copy.deepcopy(engine.module))
    plan.save_adapter(engine, work / "of ZeRO 3")  # and what the refusal says
    again = plan.load_adapter(plan.load_model(work / "head"), work / "of ZeRO 3").merge_and_unload()
    found["merged"] = again(input_ids=batch(9), labels=batch(9)).loss.item()
    found["before"] = engine(input_ids=batch(9), labels=batch(9)).loss.item()
    engine.destroy()
    two = plan.load_adapter(plan.load_model(work / "head"), work / "head" / "adapter")
    plan.load_adapter(two, work / "of ZeRO 3", name="second")
    found["svd"] = refusal(lambda: two.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third"))
    for way in ("linear", "cat"):
        two.add_weighted_adapter(["default", "second"], [0.25, 0.75], way, combination_type=way)
        two.set_adapter(way)
        found[way] = two(input_ids=batch(9), labels=batch(9)).loss.item()
    return found


def with_copied_output(plan: Any, module: str) -> Any:
    """A plan in which the output of a row-parallel layer is copied, as that of Mamba's `x_proj` is."""
    from autotp_plan.schemas.plan.document import Crossing, PlannedModule

    return dataclasses.replace(plan, modules=(PlannedModule(module=module, output=Crossing(operation="copy")),))


def loss_of_dense(folder: Path) -> float:
    from tests.helpers.models import batch, load_dense

    found: float = load_dense(folder)(input_ids=batch(9), labels=batch(9)).loss.item()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.distributed
@pytest.mark.timeout(270)
@pytest.mark.upstream
def test_adapters_do_on_a_sharded_model_what_they_do_on_the_dense_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import torch

    from tests.helpers.models import load_dense

    (wanted,) = launch(dense, 1, tmp_path)
    ranks = launch(sharded, 2, tmp_path)
    for found in ranks:
        for kind in KINDS:
            assert found[kind][:3] == pytest.approx(wanted[kind][:3], rel=1e-5), kind
            assert found[kind][3] == wanted[kind][3], kind
            assert found[kind][4] == pytest.approx(wanted[kind][4], rel=1e-5), kind
        for stage in (1, 3):
            first, resumed = found[f"trainer {stage}"]
            assert len(first) == 4 and first == pytest.approx(wanted["trainer"][0], rel=1e-5)
            assert resumed == first
        refused = found["refused"]
        for way in ("merge_and_unload", "merge_adapter"):
            assert "ZeRO 3" in refused[way] and "plan.save_adapter" in refused[way]
        assert refused["of experts"] == pytest.approx(loss_of_dense(tmp_path / "latent attention"), rel=1e-5)
        assert "kv_a_proj_with_mqa" in refused["crossing"] and "an all-reduce at its" in refused["crossing"]
        assert "layers.0.mlp.down_proj" in refused["copied output"] and "layers.1" not in refused["copied output"]
        assert "output goes into sharded weights" in refused["copied output"]
        assert refused["without it"] == pytest.approx(loss_of_dense(tmp_path / "head"), rel=1e-5)
        assert "q_proj" in refused["all-linear"] and "target_parameters" in refused["all-linear"]
        assert "plan.load_model" in refused["deepcopy"] and "'svd'" in refused["svd"]
        for way in ("merged", "cat"):
            assert refused[way] == pytest.approx(refused["before"], rel=1e-5), way
    for kind in KINDS:
        ours = load_dense(tmp_path / f"{kind} merged by a plan").state_dict()
        for name, value in load_dense(tmp_path / f"{kind} merged").state_dict().items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")
