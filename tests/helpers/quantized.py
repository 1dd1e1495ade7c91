"""Quantised checkpoints as they are published, in small, and what their weights are, by torch's own dtypes.

Codes are made from weights that a model could have, or are random bytes; what they mean is computed here from the
description of each format, and by nothing of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from autotp_plan.schemas.storage.safetensors_header import header_bytes

Weights = dict[str, torch.Tensor]

DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.uint8: "U8", torch.int8: "I8",
    torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Made:
    """Tensors of one weight on disk, and its values in float32."""

    tensors: Weights
    values: torch.Tensor


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """A scale for every element: each is repeated for its block, and what is too much left out."""
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def fp8(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    block: tuple[int, int] = (128, 128),
    scale_name: str = "{}_scale_inv",
    scale_shape: tuple[int, ...] | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Made:
    """E4M3 with a scale for each block."""
    random = torch.Generator().manual_seed(seed)
    codes = (torch.randn(shape, generator=random) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(grid(shape, block), generator=random) * 1e-3 + 1e-4
    if scale_dtype == torch.float8_e8m0fnu:
        scale = torch.randint(112, 120, scale.shape, generator=random).to(torch.uint8).view(scale_dtype)
    else:
        scale = scale.to(scale_dtype)
    values = codes.float() * spread(scale, block, shape)
    stored = scale if scale_shape is None else scale.reshape(scale_shape)
    return Made({name: codes, scale_name.format(name): stored}, values)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Two numbers below 16 for each byte, the low four bits first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()


def mxfp4(name: str, shape: tuple[int, int, int], seed: int) -> Made:
    """`shape` is that of the weight: [experts, in, out]."""
    experts, inner, outer = shape
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(117, 123, (experts, outer, inner // 32), generator=random, dtype=torch.uint8)
    values = FP4[nibbles(blocks)] * torch.exp2(scales.float() - 127)[..., None]
    return Made({f"{name}_blocks": blocks, f"{name}_scales": scales}, values.flatten(-2).transpose(1, 2))


def fp4(name: str, shape: tuple[int, int], seed: int) -> Made:
    """The experts of DeepSeek-V4."""
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (shape[0], shape[1] // 2), generator=random, dtype=torch.uint8)
    exponents = torch.randint(117, 123, (shape[0], shape[1] // 32), generator=random, dtype=torch.uint8)
    scale = exponents.view(torch.float8_e8m0fnu)
    values = FP4[nibbles(packed)] * spread(scale, (1, 32), shape)
    return Made({name: packed.view(torch.int8), name.removesuffix("weight") + "scale": scale}, values)


def int4(name: str, shape: tuple[int, int], seed: int, group: int = 32) -> Made:
    """`pack-quantized` of compressed-tensors, symmetric."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (shape[0], shape[1] // 8, 8), generator=random)
    packed = sum(codes[..., k] << 4 * k for k in range(8))
    scale = (torch.rand(grid(shape, (1, group)), generator=random) * 1e-2 + 1e-3).bfloat16()
    values = (codes.flatten(1) - 8).float() * spread(scale, (1, group), shape)
    tensors = {
        f"{name}_packed": torch.as_tensor(packed).to(torch.int32),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(shape, dtype=torch.int32),
    }
    return Made(tensors, values)


Maker = Callable[[str, tuple[int, ...], int], Made | None]


@dataclass
class Quantized:
    """A quantised checkpoint, and what its weights are in bf16."""

    folder: Path
    plain: Weights = field(default_factory=dict)


def write(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], make: Maker) -> Quantized:
    """Write a checkpoint of two files: the scales lie in another file than their codes, where there are several.

    Args:
        folder: a new folder.
        shapes: of the plain weights, by name.
        config: its config.json.
        make: the tensors of a weight; None for one that stays in bf16.
    """
    made = Quantized(folder)
    tensors: Weights = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        one = make(name, shape, seed)
        if one is None:
            random = torch.Generator().manual_seed(seed)
            values = torch.randn(shape, generator=random) * 0.05 + (1.0 if len(shape) == 1 else 0.0)
            tensors[name] = made.plain[name] = values.bfloat16()
        else:
            tensors.update(one.tensors)
            made.plain[name] = one.values.bfloat16()
    write_tensors(folder, tensors, config)
    return made


def write_tensors(folder: Path, tensors: Weights, config: Mapping[str, Any], num_files: int = 2) -> Path:
    """A checkpoint of some files, its tensors dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number in range(num_files):
        path = folder / f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = dict(list(tensors.items())[number::num_files])
        write_file(path, part)
        weight_map.update(dict.fromkeys(part, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_file(path: Path, tensors: Weights) -> None:
    """A safetensors file."""
    header = header_bytes(
        [(name, DTYPES[one.dtype], tuple(one.shape)) for name, one in tensors.items()], {"format": "pt"}
    )
    raw = b"".join(bytes(one.contiguous().reshape(-1).view(torch.uint8).numpy()) for one in tensors.values())
    path.write_bytes(header + raw)


def as_fp8(name: str, values: torch.Tensor, block: tuple[int, int]) -> Made:
    """A weight in E4M3, with the scale of each block its largest magnitude over 448."""
    rows, columns = values.shape
    size = grid((rows, columns), block)
    padded = torch.zeros(size[0] * block[0], size[1] * block[1])
    padded[:rows, :columns] = values
    largest = padded.view(size[0], block[0], size[1], block[1]).abs().amax((1, 3)).clamp(min=1e-6)
    scale = largest / 448
    wide = spread(scale, block, (rows, columns))
    codes = (values / wide).to(torch.float8_e4m3fn)
    return Made({name: codes, f"{name}_scale_inv": scale}, codes.float() * wide)


def as_mxfp4(name: str, values: torch.Tensor) -> Made:
    """Experts `[experts, in, out]` in MXFP4."""
    groups = values.float().transpose(1, 2).contiguous().unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp(min=1e-6) / 6).log2().ceil()
    codes = (groups / torch.exp2(exponent)[..., None])[..., None].sub(FP4).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    read = FP4[codes] * torch.exp2(exponent)[..., None]
    scales = (exponent + 127).to(torch.uint8)
    return Made({f"{name}_blocks": blocks, f"{name}_scales": scales}, read.flatten(-2).transpose(1, 2))


Quantizer = Callable[[str, torch.Tensor], Made | None]


def quantize(folder: Path, output: Path, settings: Mapping[str, Any], make: Quantizer) -> None:
    """Quantise a checkpoint as its publishers did.

    Args:
        folder: a checkpoint.
        output: a new folder for the quantised checkpoint; the one that has its values in bf16 is `output / "plain"`.
        settings: quantization_config.
        make: the tensors of a weight; None for one that stays as it is.
    """
    tensors: Weights = {}
    plain: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(path).items():
            one = make(name, values)
            plain[name] = values if one is None else one.values.bfloat16()
            tensors.update({name: values} if one is None else one.tensors)
    config = json.loads((folder / "config.json").read_text())
    write_tensors(output, tensors, {**config, "quantization_config": settings})
    write_tensors(output / "plain", plain, config)
