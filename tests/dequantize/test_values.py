"""The values of quantised weights against torch's own dtypes: every format, any bytes, ragged blocks, NaN."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_plan.schemas.storage.checkpoint import Checkpoint
from autotp_plan.schemas.storage.files import Reader, Span
from autotp_plan.sources.model_folder import open_checkpoint
from tests.helpers import quantized
from tests.helpers.quantized import Made, write_tensors

DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
MISTRAL = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def compressed(**weights: Any) -> dict[str, Any]:
    kind = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "group_size": None, **weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": kind}}}


INT4 = compressed(num_bits=4, type="int", strategy="group", group_size=32)
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}

CASES: dict[str, tuple[dict[str, Any], Callable[[str], Made]]] = {
    "DeepSeek": (DEEPSEEK, lambda name: quantized.fp8(name, (256, 384), 0)),
    "DeepSeek, ragged": (DEEPSEEK, lambda name: quantized.fp8(name, (192, 200), 1)),
    "DeepSeek, kv_a_proj": (DEEPSEEK, lambda name: quantized.fp8(name, (576, 64), 2)),
    "DeepSeek, less than a block": (DEEPSEEK, lambda name: quantized.fp8(name, (3, 5), 3)),
    "DeepSeek, experts in one": (DEEPSEEK, lambda name: quantized.fp8(name, (3, 130, 129), 4)),
    "Mistral": (MISTRAL, lambda name: quantized.fp8(name, (96, 64), 5, (96, 64), scale_shape=())),
    "Mistral, bf16": (
        MISTRAL,
        lambda name: quantized.fp8(name, (96, 64), 5, (96, 64), scale_shape=(), scale_dtype=torch.bfloat16),
    ),
    "rows": (
        compressed(),
        lambda name: quantized.fp8(name, (96, 60), 6, (1, 60), "{}_scale", scale_dtype=torch.bfloat16),
    ),
    "rows, wide": (compressed(), lambda name: quantized.fp8(name, (9, 1100), 6, (1, 1100), "{}_scale")),
    "tensor": (compressed(), lambda name: quantized.fp8(name, (96, 60), 7, (96, 60), "{}_scale", scale_shape=(1,))),
    "blocks of compressed-tensors": (
        compressed(strategy="block", block_structure=[64, 32]),
        lambda name: quantized.fp8(name, (100, 60), 8, (64, 32), "{}_scale"),
    ),
    "V4": (
        DEEPSEEK,
        lambda name: quantized.fp8(
            name, (200, 300), 9, scale_name=name[:-6] + "scale", scale_dtype=torch.float8_e8m0fnu
        ),
    ),
    "MXFP8": (
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        lambda name: quantized.fp8(name, (24, 96), 15, (1, 32), scale_dtype=torch.float8_e8m0fnu),
    ),
    "V4 experts": (DEEPSEEK, lambda name: quantized.fp4(name, (24, 96), 10)),
    "gpt-oss": (MXFP4, lambda name: quantized.mxfp4(name, (3, 96, 40), 11)),
    "Kimi-K2-Thinking": (INT4, lambda name: quantized.int4(name, (24, 96), 12)),
    "int4 rows": (
        compressed(num_bits=4, type="int"), lambda name: quantized.int4(name, (24, 72), 13, 72),
    ),
    "int4 by 16": (
        compressed(num_bits=4, type="int", strategy="group", group_size=16),
        lambda name: quantized.int4(name, (24, 96), 14, 16),
    ),
}  # fmt: skip


def opened(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: str = "BF16") -> Checkpoint:
    write_tensors(folder, tensors, {"quantization_config": config}, num_files=min(2, len(tensors)))
    return open_checkpoint(folder, dtype)


def read(checkpoint: Checkpoint, name: str, spans: list[Span] | None = None) -> bytes:
    entry = checkpoint.tensors[name]
    spans = spans or [Span(0, entry.stop - entry.start)]
    target = bytearray(sum(span.length for span in spans))
    with Reader() as reader:
        assert not isinstance(entry.file, Path)
        moved = [Span(entry.start + start, length) for start, length in spans]
        entry.file.read_into(memoryview(target), moved, reader)
    return bytes(target)


def raw(values: torch.Tensor) -> bytes:
    return bytes(values.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_are_those_of_torch(tmp_path: Path, case: str, dtype: str) -> None:
    config, make = CASES[case]
    name = "model.experts.gate_up_proj" if case == "gpt-oss" else "model.layers.0.mlp.up_proj.weight"
    made = make(name)
    checkpoint = opened(tmp_path, config, made.tensors, dtype)
    assert list(checkpoint.tensors) == [name]
    assert checkpoint.tensors[name].shape == tuple(made.values.shape)
    assert checkpoint.tensors[name].dtype == dtype
    wanted = raw(made.values.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]))
    assert read(checkpoint, name) == wanted
    some = random.Random(case)
    for _ in range(40):
        spans = []
        for _ in range(some.randrange(1, 4)):
            start = some.randrange(len(wanted))
            spans.append(Span(start, some.randrange(min(len(wanted) - start, 700) + 1)))
        assert read(checkpoint, name, spans) == b"".join(wanted[at : at + length] for at, length in spans)


@pytest.mark.parametrize("case", CASES)
def test_rows_and_columns(tmp_path: Path, case: str) -> None:
    """What a rank has of a row-parallel weight: the same columns of every row, through blocks and bytes."""
    config, make = CASES[case]
    made = make("gate_up_proj" if case == "gpt-oss" else "up_proj.weight")
    checkpoint = opened(tmp_path, config, made.tensors)
    ((name, entry),) = checkpoint.tensors.items()
    values = made.values.bfloat16().reshape(-1, entry.shape[-1])
    rows, columns = values.shape
    some = random.Random(case)
    for _ in range(30):
        top, left = some.randrange(rows), some.randrange(columns)
        bottom, right = some.randrange(top, rows) + 1, some.randrange(left, columns) + 1
        spans = [Span(2 * (row * columns + left), 2 * (right - left)) for row in range(top, bottom)]
        assert read(checkpoint, name, spans) == raw(values[top:bottom, left:right])


def test_every_code_and_every_scale(tmp_path: Path) -> None:
    """All 256 bytes with all powers of two, and with scales that are odd: as torch computes it, NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    odd = torch.tensor([float("nan"), float("inf"), 0.0, 3e38, 1e-45, 1e-38, -1.0, 2.0**-120]).repeat(32)[:, None]
    odd[8:16].view(torch.int32)[odd[8:16].isnan()] = 0x7FFFFFFF
    for number, scale in enumerate((exponents.view(torch.float8_e8m0fnu), odd)):
        tensors = {"a.weight": codes.view(torch.float8_e4m3fn), "a.weight_scale": scale}
        checkpoint = opened(tmp_path / str(number), compressed(), tensors)
        found = torch.frombuffer(bytearray(read(checkpoint, "a.weight")), dtype=torch.bfloat16).view(256, 256)
        wanted = (tensors["a.weight"].float() * scale.float()).bfloat16()
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found[~found.isnan()].view(torch.int16), wanted[~wanted.isnan()].view(torch.int16))
        assert found.isnan().sum() >= 512


def test_planted_errors_are_seen(tmp_path: Path) -> None:
    """The reference tells nibbles that are exchanged, and scales of the block next to them."""
    made = quantized.fp4("a.weight", (24, 96), 10)
    checkpoint = opened(tmp_path / "right", DEEPSEEK, made.tensors)
    wanted = raw(made.values.bfloat16())
    assert read(checkpoint, "a.weight") == wanted
    packed = made.tensors["a.weight"].view(torch.uint8)
    exchanged = {**made.tensors, "a.weight": (packed << 4 | packed >> 4).view(torch.int8)}
    assert read(opened(tmp_path / "nibbles", DEEPSEEK, exchanged), "a.weight") != wanted
    moved = {**made.tensors, "a.scale": made.tensors["a.scale"].view(torch.uint8).roll(1, 1).view(torch.float8_e8m0fnu)}
    assert read(opened(tmp_path / "scales", DEEPSEEK, moved), "a.weight") != wanted
