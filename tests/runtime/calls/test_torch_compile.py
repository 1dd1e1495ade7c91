"""`torch.compile` of a sharded model: losses and gradients are those without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(270)]

VARIANTS = ("llama", "gemma2", "mixtral", "bloom")
"""Plain; an embedding of its own forward; experts in a module that keeps its forward; a table per head."""


def numbers(model: Any, step: Callable[..., Any], seed: int) -> dict[str, Any]:
    from tests.helpers.models import batch

    tokens = batch(seed)
    loss = step(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[key] - one).abs().max() / one.abs().max()).item() for key, one in expected.items())


def compiled(work: Path) -> dict[str, float]:
    import torch
    from torch._dynamo.utils import counters

    from autotp_plan.runtime import load_plan

    found: dict[str, Any] = {}

    def compare(name: str, model: Any, expected: list[dict[str, Any]], step: Callable[..., Any]) -> None:
        counters.clear()
        found[name] = max(error(numbers(model, step, seed), one) for seed, one in enumerate(expected))
        assert counters["frames"]["ok"] > 3, f"{name}: nothing was compiled"
        torch._dynamo.reset()

    for variant in VARIANTS:
        model: Any = load_plan(work / f"{variant}.json").load_model(work / variant).train()
        expected = [numbers(model, model, seed) for seed in range(2)]
        compare(variant, model, expected, torch.compile(model, backend="aot_eager"))
        if variant in ("llama", "mixtral"):
            model.gradient_checkpointing_enable()
            compare(f"{variant} with checkpointing", model, expected, torch.compile(model, backend="aot_eager"))
        if variant == "llama":
            model.gradient_checkpointing_disable()
            model.compile(backend="eager")
            compare("model.compile", model, expected, model)
            model.eval()
            with torch.no_grad():
                tokens = torch.arange(3, 19)[None]
                logits = torch.compile(model.forward, backend="aot_eager")(tokens).logits
                found["logits"] = (logits - load_plan_logits(work, tokens)).abs().max().item()
    return found


def load_plan_logits(work: Path, tokens: Any) -> Any:
    from tests.helpers.models import load_dense

    return load_dense(work / "llama").eval()(tokens).logits


def head_read_by_others(work: Path) -> float:
    """A fused loss in a compiled function."""
    import torch
    import torch.nn.functional as F

    from autotp_plan.runtime import load_plan
    from tests.helpers.models import load_dense

    def loss_of(model: Any, hidden: Any) -> Any:
        weight = model.lm_head.weight
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), torch.arange(16))

    model: Any = load_plan(work / "llama.json").load_model(work / "llama").train()
    dense: Any = load_dense(work / "llama").train()
    hidden = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    loss = torch.compile(loss_of, backend="aot_eager")(model, hidden)
    loss.backward()
    expected = loss_of(dense, hidden)
    expected.backward()
    full = model.lm_head.weight.grad
    gradient = dense.lm_head.weight.grad
    return max((loss - expected).abs().item(), (full - gradient).abs().max().item())


def engines(work: Path, out: Path) -> dict[str, list[float]]:
    from transformers import Trainer, TrainingArguments

    from autotp_plan.runtime import load_plan
    from autotp_plan.runtime.data.text import TokenDataset, synthetic_tokens
    from tests.helpers import trl
    from tests.helpers.models import batch

    plan = load_plan(work / "llama.json")
    found: dict[str, list[float]] = {}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    for name in ("eager", "compiled"):
        engine, *_ = plan.initialize(plan.load_model(work / "llama").train(), config=config)
        if name == "compiled":
            engine.compile(backend="aot_eager")
        losses = []
        for step in range(3):
            loss = engine(input_ids=batch(step), labels=batch(step), use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses += [loss.item(), float(engine.get_global_grad_norm())]
        found[name] = losses
        engine.destroy()
    data = TokenDataset(synthetic_tokens(256, 32 * 12), 12)
    for name in ("Trainer", "compiled Trainer"):
        trl.forget_accelerator()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if name != "Trainer" else {}
        arguments = TrainingArguments(
            str(out), deepspeed=trl.deepspeed_config(1), max_steps=3, logging_steps=1, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, **options,
        )  # fmt: skip
        trainer = Trainer(plan.load_model(work / "llama"), arguments, train_dataset=data)
        plan.adapt_trainer(trainer)
        trainer.train()
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from autotp_plan.planner import compile_plan
    from tests.helpers.models import save_checkpoint

    folder = tmp_path_factory.mktemp("compiled")
    for variant in VARIANTS:
        plan = compile_plan(save_checkpoint(folder / variant, variant), tp_size=2)
        (folder / f"{variant}.json").write_text(plan.to_json())
    return folder


def test_compiled_models_compute_what_they_do_without(work: Path) -> None:
    for found in launch(compiled, 2, work):
        assert len(found) == len(VARIANTS) + 4
        assert max(found.values()) < 5e-6, found


def test_a_head_that_a_compiled_function_reads_is_the_full_one(work: Path) -> None:
    assert max(launch(head_read_by_others, 2, work)) < 1e-6


def test_compiled_engines_and_trainers_have_the_same_losses(work: Path, tmp_path: Path) -> None:
    for found in launch(engines, 2, work, tmp_path):
        assert found["compiled"] == pytest.approx(found["eager"], rel=1e-6)
        assert found["compiled Trainer"] == pytest.approx(found["Trainer"], rel=1e-6)
        assert len(found["Trainer"]) == 3
