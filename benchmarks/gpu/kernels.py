"""Fused kernels, where they are installed: the errors of `dtypes`, with the kernel in both models."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from benchmarks.gpu.dtypes import compare_with, parity
from benchmarks.gpu.gradients import inferred
from benchmarks.gpu.work import Found, Work, planted_in

FAMILY = "llama_bias_tied"
MIXERS = {"bamba": ("mamba_ssm", "causal_conv1d"), "qwen3_next": ("fla",)}
"""Families whose mixers are not attention, and the packages with kernels for them."""


def missing(*packages: str) -> str:
    """Those of the packages that are not installed."""
    return ", ".join(name for name in packages if importlib.util.find_spec(name) is None)


def torch_flash_attention(work: Work) -> Found:
    """torch's flash attention, with nothing to fall back on."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = functools.partial(sdpa_kernel, [SDPBackend.FLASH_ATTENTION])
    return parity(FAMILY, torch.bfloat16, work, within=chosen, attn_implementation="sdpa")


def flash_attention(work: Work) -> Found:
    """The attention of flash-attn."""
    if absent := missing("flash_attn"):
        return Found(absent=f"not installed: {absent}")
    return parity(FAMILY, torch.bfloat16, work, attn_implementation="flash_attention_2")


def liger(work: Work) -> Found:
    """Liger's norms, rotary embeddings and gated MLP, which replace those of transformers in this process."""
    if absent := missing("liger_kernel"):
        return Found(absent=f"not installed: {absent}")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    def replaced() -> Any:
        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
        return torch.enable_grad()

    return parity(FAMILY, torch.bfloat16, work, within=replaced)


def mixer(family: str, packages: tuple[str, ...], work: Work) -> Found:
    """Kernels of mixers that are not attention, which transformers takes where they are installed."""
    if absent := missing(*packages):
        return Found(absent=f"not installed: {absent}")
    from transformers import AutoModelForCausalLM

    plan, folder = inferred(work, family)
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(work.device).train()
        for dtype in (torch.float32, torch.bfloat16)
    )
    model = planted_in(work, plan.load_model(folder, dtype=torch.bfloat16).train())
    return compare_with(work, plan, model, exact=exact, rounded=rounded)
