"""The checks on a GPU: functions of `Work`, which both ranks call, that give a largest error and figures."""

from __future__ import annotations

import functools

from benchmarks.gpu import calls, estimates, gradients, large_model, training
from benchmarks.gpu.hybrids import HYBRIDS
from benchmarks.gpu.work import FLOAT32, FLOAT64, Check

FAMILIES = (
    "llama_bias_tied", "qwen3", "phi3", "gpt_neox", "gemma2", "falcon_multi_query", "falcon_alibi", "bloom", "gpt2",
    "olmo2", "codegen", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text",
)  # fmt: skip
TRAINED = ("llama", "phi3", "mixtral")

CHECKS = (
    *(
        Check(name=f"float64 {name}", function=functools.partial(gradients.parity, name), limit=FLOAT64)
        for name in FAMILIES
    ),
    Check(name="float64 planted error", function=gradients.planted),
    *(
        Check(
            name=f"engine {name} ZeRO {stage}", function=functools.partial(training.engine, name, stage), limit=FLOAT32
        )
        for name in TRAINED
        for stage in range(4)
    ),
    Check(name="engine overlap", function=training.overlap, limit=FLOAT32),
    Check(name="bf16", function=training.bf16, limit=1e-2),
    Check(name="resume", function=training.resume, limit=1e-6),
    Check(name="save_pretrained", function=calls.saving, limit=0.0),
    Check(name="generate", function=calls.generation, limit=0.0),
    Check(name="LoRA", function=training.lora, limit=FLOAT32),
    *(
        Check(name=f"optimizer {name}", function=functools.partial(training.optimizers, name), limit=limit)
        for name, limit in (("Adafactor", FLOAT32), ("LAMB", FLOAT32), ("Muon", 1e-3))
    ),
    Check(name="dropout", function=gradients.dropout, limit=FLOAT32),
    Check(name="Trainer", function=training.trainer, limit=1e-4),  # it rounds the losses that it logs to four decimals
    *(
        Check(
            name=f"hybrid {name}", function=functools.partial(gradients.hybrid, name), limit=1e-8
        )  # decays are products of many
        for name in HYBRIDS
    ),
    Check(name="hybrid in bf16", function=gradients.hybrid_kernels, limit=3e-2),
    Check(name="large loading", function=large_model.loading, limit=0.01),
    Check(name="large loss", function=large_model.large_loss, limit=1e-2),
    *(
        Check(
            name=f"estimate ZeRO {stage}" + ", checkpointing" * again,
            function=functools.partial(estimates.memory, stage, again),
            limit=0.1,
        )
        for stage, again in ((0, False), (1, True), (2, False), (3, False))
    ),
    Check(name="large batch comparison", function=large_model.steps, limit=0.005),
    Check(name="waits for the card", function=calls.synchronizing_calls, limit=0.0, needs_cuda=True),
    Check(name="too few cards", function=calls.too_few_devices, needs_cuda=True),
    Check(name="compile llama", function=functools.partial(gradients.compiled, "llama"), limit=1e-4),
    Check(name="compile mixtral", function=functools.partial(gradients.compiled, "mixtral"), limit=1e-4),
    Check(name="FusedAdam", function=training.fused_adam, limit=FLOAT32, needs_cuda=True),
    *(
        Check(
            name=f"offload ZeRO {stage}",
            function=functools.partial(training.offload, stage),
            limit=FLOAT32,
            needs_cuda=True,
        )
        for stage in (2, 3)
    ),
    Check(name="unknown token", function=calls.unknown_token),
)
"""In the order in which they run: what is new on a card, and what may take long, comes last."""
