"""Checkpoints whose weights are quantised with separate scales: recognised, and refused.

Their tensors are not the module's parameters: fp8 blocks with `weight_scale_inv` (DeepSeek-V3), MXFP4 `_blocks` and
`_scales` (gpt-oss), GPTQ, AWQ and bitsandbytes. Sharded as if they were weights, they would lose their scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.names import starred

_ENDINGS = (
    "_scale_inv", ".weight_scale", "_blocks", "_scales", ".qweight", ".qzeros", ".scales", ".absmax", ".SCB",
)  # fmt: skip


def refuse_quantised(config: Mapping[str, Any] | None, names: Iterable[str], where: str) -> None:
    """Raise CheckpointError when the checkpoint's config or its tensors' `names` say that it is quantised."""
    settings = (config or {}).get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    scales = sorted({starred(name) for name in names if name.endswith(_ENDINGS)})
    if not settings and not scales:
        return
    got = [f"quantization_config of {method or 'an unknown method'}"] if settings else []
    got += [f"tensors such as {scales[0]}"] if scales else []
    raise CheckpointError(
        Fault(
            code="quantised-weights",
            what="the checkpoint's weights are quantised",
            where=where,
            got=", ".join(got),
            expected="weights in bf16, fp16 or fp32: training shards need the weights themselves",
            next="use the model's bf16 checkpoint, or make one: load it with transformers' "
            "`dequantize=True` and `save_pretrained`",
        )
    )
