"""LoRA adapters of PEFT: gradients and losses of the dense model's, and an adapter that loads on the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotp_plan.schemas.errors import MismatchError
from tests.helpers.launch import launch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 3
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


def lora_config(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def randomise_adapter(model: Any) -> None:
    """B begins as zero, and then A has no gradient."""
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                numbers = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(numbers * 0.1)


def prepare(folder: Path) -> None:
    """`folder/checkpoint`, and `folder/adapter`: what an unsharded model begins with."""
    import torch
    from peft import get_peft_model

    from tests.helpers.models import load_dense, save_checkpoint

    save_checkpoint(folder / "checkpoint", "llama")
    torch.manual_seed(0)
    model = get_peft_model(load_dense(folder / "checkpoint"), lora_config())
    randomise_adapter(model)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def dense_run(folder: Path) -> tuple[list[float], dict[str, Any], float]:
    """Losses of STEPS steps, the gradients of the first, the loss after the last."""
    import torch
    from peft import PeftModel

    from tests.helpers.models import batch, load_dense

    model = PeftModel.from_pretrained(load_dense(folder / "checkpoint"), str(folder / "adapter"), is_trainable=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-5)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, gradients, model(input_ids=batch(99), labels=batch(99)).loss.item()


def in_two_ranks(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import TrainingPlan
    from autotp_plan.runtime.tensor_parallel.collectives import take
    from tests.helpers.models import batch

    plan = TrainingPlan(compile_plan(folder / "checkpoint", tp_size=2))
    found: dict[str, Any] = {}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    for stage in (0, 2, 3):
        torch.manual_seed(torch.distributed.get_rank())  # adapters that begin unlike each other must not stay so
        model = plan.add_lora(plan.load_model(folder / "checkpoint"), lora_config())
        found["first"] = model.get_parameter(FIRST).detach().clone()
        local = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                whole = adapter[name.replace(".default", "")]
                owner = model.get_submodule(name.rpartition(".")[0])
                layout = owner.shards.layouts["weight"] if hasattr(owner, "shards") else None
                local[name] = (parameter, layout)
                rank = plan.ranks.tp_rank
                parameter.data = whole.clone() if layout is None else take(whole, layout.intervals[rank], layout.dim)
        if stage == 0:
            model.train()
            model(input_ids=batch(0), labels=batch(0)).loss.backward()
            found["gradients"] = {
                name: (parameter.grad.clone(), layout and (layout.intervals[plan.ranks.tp_rank], layout.dim))
                for name, (parameter, layout) in local.items()
            }
            model.zero_grad()
        engine, _, _, _ = plan.initialize(
            model,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0.5,
                "zero_optimization": {"stage": stage},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5, "torch_adam": True,
                                                          "weight_decay": 0.01}},
            },
        )  # fmt: skip
        losses = []
        for step in range(STEPS):
            loss = engine(input_ids=batch(step), labels=batch(step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found[str(stage)] = losses
        plan.save_adapter(engine, folder / f"adapter-{stage}")
        engine.destroy()
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.upstream
def test_adapters_on_column_and_row_layers_train_like_unsharded_ones(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import torch
    from peft import PeftModel

    from autotp_plan.runtime.tensor_parallel.collectives import take
    from tests.helpers.models import batch, load_dense

    prepare(tmp_path)
    losses, gradients, after = dense_run(tmp_path)
    ranks = launch(in_two_ranks, 2, tmp_path, timeout=200)
    assert torch.equal(ranks[0]["first"], ranks[1]["first"]), "the ranks began with different adapters"
    for found in ranks:
        assert found["gradients"].keys() == gradients.keys() and len(gradients) == 2 * 2 * len(TARGETS)
        for name, (gradient, cut) in found["gradients"].items():
            wanted = gradients[name] if cut is None else take(gradients[name], *cut)
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)
        for stage in (0, 2, 3):
            assert found[str(stage)] == pytest.approx(losses, rel=1e-5), stage
    for stage in (0, 2, 3):
        model = PeftModel.from_pretrained(load_dense(tmp_path / "checkpoint"), str(tmp_path / f"adapter-{stage}"))
        with torch.no_grad():
            assert model(input_ids=batch(99), labels=batch(99)).loss.item() == pytest.approx(after, rel=1e-5), stage


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"lora_dropout": 0.1}, "LoraConfig.lora_dropout"),
        ({"use_dora": True}, "LoraConfig.use_dora"),
        ({"modules_to_save": ["lm_head"]}, "LoraConfig.modules_to_save"),
        ({"lora_bias": True}, "LoraConfig.lora_bias"),
        ({"bias": "all"}, "LoraConfig.bias"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "LoraConfig.target_parameters"),
        ({"init_lora_weights": "pissa"}, "LoraConfig.init_lora_weights"),
    ],
)
def test_unsupported_options_of_peft_are_refused(options: dict[str, Any], where: str) -> None:
    pytest.importorskip("peft")
    from autotp_plan.runtime.integrations.lora_config import check_config

    with pytest.raises(MismatchError) as caught:
        check_config(lora_config(**options))
    assert [fault.where for fault in caught.value.faults] == [where]
