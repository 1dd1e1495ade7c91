"""What a config says about how its checkpoint is quantised, and which ways are understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_plan.schemas.errors import CheckpointError, Fault
from autotp_plan.schemas.plan.entries import Dequantization
from autotp_plan.schemas.storage.checkpoint import quantization_of

MODELOPT_CONFIG = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt says how a checkpoint is quantised, if config.json does not."""

_MX_BLOCK = (1, 32)
_FORMATS = (None, "dense", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
"""Of compressed-tensors: how codes are written. Others pack them in another order, or leave zeros out."""

_UNDERSTOOD = "fp8 (DeepSeek, Mistral), mxfp4 (gpt-oss), compressed-tensors with fp8 or 4-bit integers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How weights are quantised.

    Attributes:
        method: `quant_method`.
        block: rows and columns that have one scale; None where the config does not say so.
        rows_have_scales: each row may have a scale.
        num_bits: of a code, where they are integers.
    """

    method: str
    block: tuple[int, int] | None = None
    rows_have_scales: bool = False
    num_bits: int | None = None

    def dequantization(self, dtype: str) -> Dequantization:
        """What a plan says."""
        return Dequantization(method=self.method, dtype=dtype, block=self.block)


def settings_of(config: Mapping[str, Any] | None, folder: Path) -> Settings | None:
    """How a checkpoint is quantised; None where it is not.

    Args:
        config: its config.json.
        folder: where it lies.

    Raises:
        CheckpointError: it is quantised in a way that is not understood.
    """
    found = quantization_of(config)
    if (folder / MODELOPT_CONFIG).exists():
        raise refused(folder, f"{MODELOPT_CONFIG} of NVIDIA's ModelOpt")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method == "fp8":
        return Settings(method=method, block=_block(found.get("weight_block_size")))
    if method == "mxfp4":
        return Settings(method=method, block=_MX_BLOCK)
    if method == "compressed-tensors":
        return _compressed_tensors(found, folder)
    raise refused(folder, f"quantization_config of {method or 'an unknown method'}")


def refused(folder: Path, got: str) -> CheckpointError:
    """The error for a checkpoint in a format that is not understood."""
    return CheckpointError(
        Fault(
            code="quantised-weights",
            what="the checkpoint's weights are quantised in a way that is not understood",
            where=str(folder),
            got=got,
            expected=f"weights in bf16, fp16 or fp32, or quantised: {_UNDERSTOOD}",
            next="give the model's checkpoint in one of these: most models that are quantised in another way were "
            "published in bf16 before",
        )
    )


def _compressed_tensors(found: Mapping[str, Any], folder: Path) -> Settings:
    """The weights of all groups must be quantised alike; a group is what some modules have in common."""
    groups = found.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    sparsity = found.get("sparsity_config")
    for described in (found, *groups, sparsity):
        written = described.get("format") if isinstance(described, Mapping) else None
        if written not in _FORMATS:
            raise refused(folder, f"compressed-tensors in the format {written}")
    kinds = []
    for group in groups:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            kinds.append(weights)
    names = dict.fromkeys(f"{kind.get('num_bits')}-bit {kind.get('type')}" for kind in kinds)
    if not kinds or not names.keys() <= {"8-bit float", "4-bit int"}:
        raise refused(folder, f"compressed-tensors with {' and '.join(names) or 'no weights'}")
    if any(kind.get("symmetric") is False for kind in kinds):
        raise refused(folder, "compressed-tensors with zero points (not symmetric)")
    if any(kind.get("actorder") not in (None, False, "weight", "static") for kind in kinds):
        raise refused(folder, "compressed-tensors with columns in another order (actorder)")
    blocks = {_group_block(kind) for kind in kinds} - {None}
    if len(blocks) > 1:
        raise refused(folder, f"compressed-tensors with blocks of {' and '.join(sorted(map(str, blocks)))}")
    return Settings(
        method="compressed-tensors",
        block=next(iter(blocks), None),
        rows_have_scales=True,
        num_bits=next((4 for kind in kinds if kind.get("type") == "int"), None),
    )


def _group_block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that have one scale; None for a row, or for all."""
    block = _block(weights.get("block_structure"))
    if block is not None:
        return block
    size = weights.get("group_size")
    return (1, size) if isinstance(size, int) and size > 0 else None


def _block(found: Any) -> tuple[int, int] | None:
    if isinstance(found, str):  # older files have "128x128"
        found = [int(part) if part.isdigit() else 0 for part in found.split("x")]
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    return None
