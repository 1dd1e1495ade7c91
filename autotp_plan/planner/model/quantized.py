"""Checkpoints whose weights are quantised with separate scales: recognised, and refused.

Their tensors are not the module's parameters: fp8 blocks with `weight_scale_inv` (DeepSeek-V3), MXFP4 `_blocks` and
`_scales` (gpt-oss), GPTQ, AWQ and bitsandbytes. Sharded as if they were weights, they would lose their scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.names import starred

QUANT_CONFIG = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt says how a checkpoint is quantised, if config.json does not."""

_ENDINGS = (
    "_scale_inv", ".weight_scale", "_blocks", "_scales", ".qweight", ".qzeros", ".scales", ".absmax", ".SCB",
)  # fmt: skip


def refuse_quantised(config: Mapping[str, Any] | None, names: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError for a checkpoint that is quantised.

    Args:
        config: its config.json.
        names: of its tensors; none for a bare config.
        folder: where it lies; it may have an hf_quant_config.json.

    Raises:
        CheckpointError: its config, a file next to it or its tensors say that it is quantised.
    """
    text = (config or {}).get("text_config")
    settings = (config or {}).get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    scales = sorted({starred(name) for name in names if name.endswith(_ENDINGS)})
    got = [f"quantization_config of {method or 'an unknown method'}"] if settings else []
    got += [QUANT_CONFIG] if (folder / QUANT_CONFIG).exists() else []
    got += [f"tensors such as {scales[0]}"] if scales else []
    if not got:
        return
    raise CheckpointError(
        Fault(
            code="quantised-weights",
            what="the checkpoint's weights are quantised",
            where=str(folder),
            got=", ".join(got),
            expected="weights in bf16, fp16 or fp32: training shards need the weights themselves",
            next="use the model's bf16 checkpoint, or make one: load it with transformers' "
            "`dequantize=True` and `save_pretrained`",
        )
    )
