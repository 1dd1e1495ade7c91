"""Steps of training on a GPU: engines under ZeRO, other optimizers, adapters, Trainer, and a job that is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.work import (
    STEPS,
    Error,
    Found,
    Work,
    adam_losses,
    batches,
    checkpoint,
    dense,
    planted_in,
    relative,
    sharded,
)


def engine(variant: str, stage: int, work: Work, **changes: Any) -> Found:
    """Losses of steps of a DeepSpeed engine in float32."""
    from autotp_plan.runtime.verify import optimizer_steps
    from autotp_plan.runtime.verify.float64_passes import causal_lm

    training = optimizer_steps.Training(batches=batches(work), num_steps=STEPS, eps=1e-5)
    expected = optimizer_steps.dense_steps(dense(work, variant), training, causal_lm)
    plan, model = sharded(work, variant)
    norms = (lambda _: 0.0) if stage == 0 else (lambda made: made.get_global_grad_norm())
    found = optimizer_steps.engine_steps(
        plan, model, training, zero_stage=stage, forward=causal_lm, norm=norms, **changes
    )
    columns = 1 if stage == 0 else 2  # without ZeRO an engine does not tell its norm
    return Error.of_all(relative([s[i] for s in found], [s[i] for s in expected]) for i in range(columns)).found()


def overlap(work: Work) -> Found:
    """All-reduces that run while a weight's gradient is computed."""
    settings = {"autotp_size": dist.get_world_size(), "tp_overlap_comm": True}
    return engine("llama", 3, work, tensor_parallel=settings)


def fused_adam(work: Work) -> Found:
    """DeepSpeed's own AdamW, compiled for the card."""
    from autotp_plan.runtime.verify.optimizer_steps import Training

    adam = Training(batches=batches(work), eps=1e-5).adam
    return engine("llama", 1, work, optimizer={"type": "AdamW", "params": {**adam, "adam_w_mode": True}})


def offload(stage: int, work: Work) -> Found:
    """DeepSpeed's AdamW in the memory of the host."""
    from autotp_plan.runtime.verify.optimizer_steps import Training

    adam = Training(batches=batches(work), eps=1e-5).adam
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    return engine(
        "llama",
        stage,
        work,
        zero_optimization=zero,
        optimizer={"type": "AdamW", "params": {**adam, "adam_w_mode": True}},
    )


def bf16(work: Work) -> Found:
    """Losses in bfloat16 under each ZeRO stage against the unsharded engine's in bfloat16."""
    errors: dict[str, Error] = {}
    tokens = batches(work)
    whole = dense(work, "llama", torch.bfloat16)
    master = [value.detach().float().requires_grad_() for value in whole.parameters()]
    adam: dict[str, Any] = {"lr": 2e-3, "eps": 1e-5, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(master, **adam)
    expected = []
    for step in range(STEPS):
        loss = whole(input_ids=tokens(step), labels=tokens(step), use_cache=False).loss
        loss.backward()
        for copy, value in zip(master, whole.parameters(), strict=True):
            copy.grad, value.grad = value.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            for copy, value in zip(master, whole.parameters(), strict=True):
                value.copy_(copy)
        expected.append(loss.item())
    for stage in (1, 2, 3):
        plan, model = sharded(work, "llama", dtype=torch.bfloat16)
        config = {
            "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
            "gradient_clipping": 1.0, "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        }  # fmt: skip
        made, _, _, _ = plan.initialize(model, config=config)
        losses = []
        for step in range(STEPS):
            loss = made(input_ids=tokens(step), labels=tokens(step), use_cache=False).loss
            made.backward(loss)
            made.step()
            losses.append(loss.item())
        made.destroy()
        errors[f"ZeRO {stage}"] = relative(losses, expected, planted=0.03)
    return Error.of_all(errors.values()).found(**{name: error.worst for name, error in errors.items()})


def resume(work: Work) -> Found:
    """A job that is saved and resumed has the losses of one that goes on; and shards of it."""
    tokens = batches(work)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    }  # fmt: skip

    def step(made: Any, seed: int) -> float:
        loss = made(input_ids=tokens(seed), labels=tokens(seed), use_cache=False).loss
        made.backward(loss)
        made.step()
        return float(loss)

    changes = {"attention_dropout": 0.1}  # random numbers of the card are saved too
    plan, model = sharded(work, "llama", changes=changes)
    first, _, _, _ = plan.initialize(model, config=config)
    step(first, 0)
    plan.save_checkpoint(first, work.folder / "job")
    plan.save_shards(first, work.folder / "trained")
    expected = [step(first, seed) for seed in (1, 2)]
    plan, model = sharded(work, "llama", changes=changes)
    second, _, _, _ = plan.initialize(model, config=config)
    plan.load_checkpoint(second, work.folder / "job")
    found = [step(second, seed) for seed in (1, 2)]
    return relative(found, expected).found()


def lora(work: Work) -> Found:
    """Losses of steps of an adapter in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = checkpoint(work, "llama")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )

    def write(path: Path) -> None:
        from tests.helpers.models import load_dense

        torch.manual_seed(0)
        model = get_peft_model(load_dense(folder), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.1)
        model.save_pretrained(str(path), save_embedding_layers=False)

    adapter = work.once("adapter", write)
    plan, model = sharded(work, "llama")
    runs = [
        PeftModel.from_pretrained(dense(work, "llama"), str(adapter), is_trainable=True),
        planted_in(work, plan.load_adapter(model, adapter)),
    ]
    return relative(adam_losses(work, runs[1]), adam_losses(work, runs[0])).found()


def optimizers(name: str, work: Work) -> Found:
    """An optimizer that looks at whole tensors, in a loop without an engine."""
    from tests.helpers.optimizers import Lamb

    def make(model: Any) -> Any:
        matrices = [value for value in model.parameters() if value.dim() == 2]
        made: dict[str, Callable[[], Any]] = {
            "Adafactor": lambda: torch.optim.Adafactor(model.parameters(), lr=1e-2),
            "LAMB": lambda: Lamb(model.parameters(), lr=1e-3),
            "Muon": lambda: torch.optim.Muon(matrices, lr=1e-3),
        }
        return made[name]()

    whole = dense(work, "phi3")
    plan, model = sharded(work, "phi3")
    optimizer = make(model)
    plan.adapt_optimizer(model, optimizer)
    return relative(adam_losses(work, model, optimizer), adam_losses(work, whole, make(whole))).found()


def trainer(work: Work) -> Found:
    """Hugging Face's Trainer: the losses of a loop over the unsharded model."""
    from transformers import Trainer, TrainingArguments

    from tests.helpers.models import batch

    plan, model = sharded(work, "llama")
    rows = [{"input_ids": row, "labels": row} for seed in range(STEPS) for row in batch(seed)]
    arguments = TrainingArguments(
        str(work.folder / "trainer"), per_device_train_batch_size=2, max_steps=STEPS, report_to=[], disable_tqdm=True,
        logging_steps=1, lr_scheduler_type="constant", learning_rate=1e-2, adam_epsilon=1e-5, weight_decay=0.01,
        max_grad_norm=0.5, save_strategy="no", use_cpu=work.device == "cpu", train_sampling_strategy="sequential",
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": 1},
        },
    )  # fmt: skip
    made = Trainer(model, arguments, train_dataset=rows)
    plan.adapt_trainer(made)
    made.train()
    found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return relative(found, adam_losses(work, dense(work, "llama"))).found()
