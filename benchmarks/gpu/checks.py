"""The checks on a GPU, the most important first: what fits no more into the time is not run, and the page says so."""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu import (
    calls,
    dtypes,
    estimates,
    gradients,
    kernels,
    large_model,
    loading,
    memory,
    programs,
    training,
)
from benchmarks.gpu.hybrids import HYBRIDS
from benchmarks.gpu.work import FLOAT32, FLOAT64, Check

FAMILIES = (
    "llama_bias_tied", "qwen3", "phi3", "gpt_neox", "gemma2", "falcon_multi_query", "falcon_alibi", "bloom", "gpt2",
    "olmo2", "codegen", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text",
)  # fmt: skip
TRAINED = ("llama", "phi3", "mixtral")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PARITY = "Parity in bfloat16 and float32"
NCCL = "One rank, NCCL"
MEMORY = "Peak memory of training"
LOADING = "Loading"
ESTIMATES = "Estimates of memory"
KERNELS = "Fused kernels"
FLOATS = "Losses, logits and gradients in float64"
TRAINING = "Training"
CALLS = "Calls on a sharded model"
LARGE = "The shapes of Llama-3.1-8B"

CHECKS = (
    *(
        Check(
            name=f"{name} {variant}",
            function=functools.partial(dtypes.parity, variant, dtype),
            topic=PARITY,
            limit=dtypes.LIMIT,
            small=variant in ("llama_bias_tied", "mixtral"),
        )
        for name, dtype in DTYPES.items()
        for variant in dtypes.FAMILIES
    ),
    *(
        Check(
            name=f"{name} {variant}, sequence parallelism",
            function=functools.partial(dtypes.parity, variant, dtype, planned={"sequence_parallel": True}),
            topic=PARITY,
            limit=dtypes.LIMIT,
            small=(name, variant) == ("float32", "llama_bias_tied"),
        )
        for name, dtype in DTYPES.items()
        for variant in dtypes.FAMILIES
    ),
    *(
        Check(
            name=f"memory, {one.name}",
            function=functools.partial(memory.option, one),
            topic=MEMORY,
            limit=memory.LIMIT,
            seconds=60,
            spoils=one.zero_stage == 3,
            small=True,
        )
        for one in memory.OPTIONS
    ),
    *(
        Check(
            name=f"one rank, {name} {variant}",
            function=functools.partial(dtypes.parity, variant, dtype),
            topic=NCCL,
            limit=dtypes.LIMIT,
            ranks=1,
            small=(name, variant) == ("float32", "qwen3"),
        )
        for name, dtype in DTYPES.items()
        for variant in dtypes.FAMILIES
    ),
    *(
        Check(
            name=f"one rank, engine llama ZeRO {stage}",
            function=functools.partial(training.engine, "llama", stage),
            topic=NCCL,
            limit=FLOAT32,
            ranks=1,
            small=stage == 3,
        )
        for stage in range(4)
    ),
    *(
        Check(
            name=f"memory, {title}",
            function=functools.partial(memory.system, name),
            topic=MEMORY,
            limit=memory.LIMIT,
            seconds=60,
            ranks=0,
            small=name == "transformers",
        )
        for name, title in memory.SYSTEMS.items()
    ),
    *(
        Check(
            name=f"{way}, from the {state}",
            function=functools.partial(loading.speed, way, state),
            topic=LOADING,
            limit=0.0,
            seconds=120,  # the first writes the model
            small=True,
        )
        for state in loading.STATES
        for way in loading.WAYS
    ),
    *(
        Check(
            name=f"estimate ZeRO {stage}" + ", checkpointing" * again,
            function=functools.partial(estimates.memory, stage, again),
            topic=ESTIMATES,
            limit=0.1,
            seconds=60,
            spoils=stage == 3,
            small=stage == 1,
        )
        for stage, again in ((0, False), (1, True), (2, False), (3, False))
    ),
    Check(
        name="torch's flash attention",
        function=kernels.torch_flash_attention,
        topic=KERNELS,
        limit=dtypes.LIMIT,
        small=True,
    ),
    Check(name="flash_attn", function=kernels.flash_attention, topic=KERNELS, limit=dtypes.LIMIT, small=True),
    *(
        Check(
            name=", ".join(packages),
            function=functools.partial(kernels.mixer, family, packages),
            topic=KERNELS,
            limit=dtypes.LIMIT,
            small=True,
            hybrid="" if kernels.missing(*packages) else family,
        )
        for family, packages in kernels.MIXERS.items()
    ),
    Check(name="liger_kernel", function=kernels.liger, topic=KERNELS, limit=dtypes.LIMIT, spoils=True, small=True),
    *(
        Check(
            name=f"float64 {name}",
            function=functools.partial(gradients.parity, name),
            topic=FLOATS,
            limit=FLOAT64,
            small=name == "phi3",
        )
        for name in FAMILIES
    ),
    Check(name="float64 planted error", function=gradients.planted, topic=FLOATS, small=True),
    *(
        Check(
            name=f"engine {name} ZeRO {stage}",
            function=functools.partial(training.engine, name, stage),
            topic=TRAINING,
            limit=FLOAT32,
            small=(name, stage) == ("phi3", 1),
        )
        for name in TRAINED
        for stage in range(4)
    ),
    Check(name="engine overlap", function=training.overlap, topic=TRAINING, limit=FLOAT32),
    # three and four times what was measured on an H200: a gradient that is off by a hundredth is more
    Check(name="bf16", function=training.bf16, topic=TRAINING, limit=3e-3),
    Check(name="resume", function=training.resume, topic=TRAINING, limit=1e-6, small=True),
    Check(name="save_pretrained", function=calls.saving, topic=CALLS, limit=0.0, small=True),
    Check(name="generate", function=calls.generation, topic=CALLS, limit=0.0, small=True),
    Check(name="LoRA", function=training.lora, topic=TRAINING, limit=FLOAT32, small=True),
    *(
        Check(
            name=f"optimizer {name}",
            function=functools.partial(training.optimizers, name),
            topic=TRAINING,
            limit=limit,
            small=name == "LAMB",
        )
        for name, limit in (("Adafactor", FLOAT32), ("LAMB", FLOAT32), ("Muon", 3e-5))
    ),
    Check(name="dropout", function=gradients.dropout, topic=FLOATS, limit=FLOAT32, small=True),
    # Trainer rounds the losses that it logs to four decimals
    Check(name="Trainer", function=training.trainer, topic=TRAINING, limit=1e-4),
    *(
        Check(
            name=f"hybrid {name}",
            function=functools.partial(gradients.hybrid, name),
            topic=FLOATS,
            limit=1e-8,  # decays are products of many
            seconds=gradients.INFERENCE_SECONDS,
            hybrid=name,
        )
        for name in HYBRIDS
    ),
    Check(name="hybrid in bf16", function=gradients.hybrid_kernels, topic=FLOATS, limit=3e-2, hybrid="qwen3_next"),
    Check(name="large loading", function=large_model.loading, topic=LARGE, limit=0.01, seconds=90, small=True),
    Check(name="large loss", function=large_model.large_loss, topic=LARGE, limit=1e-2, seconds=60, small=True),
    Check(name="large batch comparison", function=large_model.steps, topic=LARGE, limit=0.005, seconds=60, small=True),
    Check(name="waits for the card", function=calls.synchronizing_calls, topic=CALLS, limit=0.0, needs_cuda=True),
    Check(name="too few cards", function=calls.too_few_devices, topic=CALLS, needs_cuda=True),
    *(
        Check(
            name=f"compile {name}",
            function=functools.partial(gradients.compiled, name),
            topic=FLOATS,
            limit=1e-4,
            seconds=90,
        )
        for name in ("llama", "mixtral")
    ),
    Check(name="FusedAdam", function=training.fused_adam, topic=TRAINING, limit=FLOAT32, seconds=90, needs_cuda=True),
    *(
        Check(
            name=f"offload ZeRO {stage}",
            function=functools.partial(training.offload, stage),
            topic=TRAINING,
            limit=FLOAT32,
            seconds=90,
            needs_cuda=True,
        )
        for stage in (2, 3)
    ),
    Check(name="unknown token", function=calls.unknown_token, topic=CALLS, spoils=True),
    Check(
        name="program on one card, NCCL",
        function=programs.one_card,
        topic=NCCL,
        limit=FLOAT32,
        seconds=120,
        ranks=0,
        needs_cuda=True,
    ),
    Check(
        name="program with too few cards",
        function=programs.too_few_cards,
        topic=CALLS,
        seconds=120,
        ranks=0,
        needs_cuda=True,
    ),
)
