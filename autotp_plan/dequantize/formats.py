"""Which tensors of a checkpoint are codes and scales of which weights, by their names, dtypes and shapes.

Facts from the published checkpoints, and from transformers' own readers of them: DeepSeek-V3 (`weight_scale_inv`),
DeepSeek-V4 (`scale`, FP4 experts), gpt-oss (`_blocks` and `_scales`), Ministral 3 (scales without a dimension), Kimi-K2
and others in the formats of the package compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autotp_plan.dequantize.quantized_tensor import Coding, QuantizedTensor
from autotp_plan.dequantize.settings import Settings
from autotp_plan.schemas.fault_book import FaultBook
from autotp_plan.schemas.storage.safetensors_header import TensorEntry

Tensors = Mapping[str, TensorEntry]

SCALE_ENDINGS = (
    "_scale_inv", ".weight_scale", ".qscale_weight", "_blocks", "_scales", ".qweight", ".qzeros", ".scales", ".absmax",
    ".SCB", ".weight_packed", ".weight_zero_point", ".weight_g_idx", ".weight_scale_2", ".weight_global_scale",
)  # fmt: skip
"""What ends the names of tensors that only quantised checkpoints have."""

_OF_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")
"""Scales that only serving uses, next to a weight."""

_OF_CACHE = (".q_scale", ".k_scale", ".v_scale", ".kv_scale")
"""Scales of the cache of keys and values, one number each."""

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_POWERS = ("U8", "F8_E8M0")
_MXFP4_GROUP = 32
_INT4_IN_WORD = 8


@dataclass
class Found:
    """What was found: weights, by the name of their codes; and tensors that the plain checkpoint does not have."""

    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)


def find_quantized(tensors: Tensors, settings: Settings, book: FaultBook) -> Found:
    """The quantised weights of a checkpoint.

    Args:
        tensors: of the checkpoint, by name.
        settings: what its config says.
        book: gets weights without scales, scales of another shape than the codes need, and what is not understood.
    """
    found = Found()
    for name, codes in tensors.items():
        if codes.dtype == "F8_E4M3":
            weight = _fp8(name, codes, tensors, settings, book)
        elif name.endswith("_blocks") and codes.dtype == "U8":
            weight = _mxfp4(name, codes, tensors, book)
        elif name.endswith(".weight_packed") and codes.dtype == "I32":
            weight = _int4(name, codes, tensors, settings, book)
        elif codes.dtype in ("I8", "U8") and _scale_of(name, tensors) is not None:
            weight = _fp4(name, codes, tensors, book)
        else:
            continue
        if weight is None:
            continue
        if weight.name != name and weight.name in tensors:
            _odd(book, name, f"{weight.name} too", "either codes or the weight itself")
        found.weights[name] = weight
        found.dropped.add(weight.scale.name)
        if weight.stated_shape is not None:
            found.dropped.add(weight.stated_shape.name)
        stem = weight.name.removesuffix("weight")
        found.dropped.update(name for name in (stem + ending for ending in _OF_ACTIVATIONS) if name in tensors)
    if found.weights:
        found.dropped.update(
            name for name, one in tensors.items() if name.endswith(_OF_CACHE) and one.shape in ((), (1,))
        )
    for name in tensors:
        if name.endswith(SCALE_ENDINGS) and name not in found.dropped and name not in found.weights:
            book.add(
                "not-understood-scales",
                "a quantised weight is in a format that is not understood",
                name,
                got=f"{tensors[name].dtype} of {list(tensors[name].shape)}, and no codes that belong to it",
                expected=f"codes and scales as {settings.method} has them",
                next="fetch the checkpoint again; or use the model's checkpoint in bf16",
            )
    return found


def _scale_of(name: str, tensors: Tensors) -> TensorEntry | None:
    """The scale of a weight with the name `name`, whatever it is called."""
    stem, dot, leaf = name.rpartition(".")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if leaf == "weight":
        names += [f"{stem}{dot}scale", f"{stem}{dot}qscale_weight"]
    return next((tensors[one] for one in names if one in tensors), None)


def _fp8(
    name: str, codes: TensorEntry, tensors: Tensors, settings: Settings, book: FaultBook
) -> QuantizedTensor | None:
    """A weight of which each value is a byte. Its scale is one number, one per row, or one per block."""
    scale = _scale_of(name, tensors)
    if scale is None:
        _no_scale(book, name, codes)
        return None
    if len(codes.shape) < 2:
        _odd(book, name, f"{codes.dtype} of {list(codes.shape)}", "two dimensions or more")
        return None
    rows, columns = codes.shape[-2:]
    blocks = [settings.block] if settings.block else []
    blocks.append((rows, columns))
    blocks += [(1, columns), (1, _MXFP4_GROUP)] if settings.rows_have_scales or scale.dtype in _POWERS else []
    return _with_scale(name, codes, codes.shape, scale, "E4M3", blocks, book)


def _fp4(name: str, codes: TensorEntry, tensors: Tensors, book: FaultBook) -> QuantizedTensor | None:
    """A weight of FP4, two in a byte, with a power of two for each 32 columns: experts of DeepSeek-V4."""
    scale = _scale_of(name, tensors)
    assert scale is not None
    if scale.dtype not in _POWERS or len(codes.shape) < 2:
        _odd(book, name, f"{codes.dtype}, with a scale of {scale.dtype}", "FP4 with scales of F8_E8M0")
        return None
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    return _with_scale(name, codes, shape, scale, "FP4", [(1, _MXFP4_GROUP)], book)


def _mxfp4(name: str, codes: TensorEntry, tensors: Tensors, book: FaultBook) -> QuantizedTensor | None:
    """The experts of gpt-oss, `[experts, out, in / 32, 16]`; the weight is `[experts, in, out]`."""
    stem = name.removesuffix("_blocks")
    scale = tensors.get(f"{stem}_scales")
    if scale is None:
        _no_scale(book, name, codes)
        return None
    if len(codes.shape) != 4 or codes.shape[3] != _MXFP4_GROUP // 2:
        _odd(book, name, f"{codes.dtype} of {list(codes.shape)}", "four dimensions, the last of 16 bytes")
        return None
    experts, rows, groups, _ = codes.shape
    shape = (experts, groups * _MXFP4_GROUP, rows)
    return _with_scale(stem, codes, shape, scale, "FP4", [(1, _MXFP4_GROUP)], book, transposed=True)


def _int4(
    name: str, codes: TensorEntry, tensors: Tensors, settings: Settings, book: FaultBook
) -> QuantizedTensor | None:
    """A weight of four bits plus 8, eight in a word, with a scale for each group of columns: `pack-quantized`."""
    stem = name.removesuffix("_packed")
    for ending, what in (("_zero_point", "asymmetric: zero points"), ("_g_idx", "columns in another order: g_idx")):
        if stem + ending in tensors:
            _odd(book, stem + ending, what, "symmetric codes, in the order of the columns")
            return None
    scale = tensors.get(f"{stem}_scale")
    if scale is None:
        _no_scale(book, name, codes)
        return None
    if len(codes.shape) != 2 or settings.num_bits not in (None, 4):
        got = f"{settings.num_bits} bits, {codes.dtype} of {list(codes.shape)}"
        _odd(book, name, got, "4 bits, and two dimensions")
        return None
    rows, columns = codes.shape[0], codes.shape[1] * _INT4_IN_WORD
    blocks = [settings.block] if settings.block else []
    blocks += [(1, columns), (rows, columns)]
    stated = tensors.get(f"{stem}_shape")
    if stated is not None and (stated.dtype not in ("I32", "I64") or stated.shape != (2,)):
        _odd(book, stated.name, f"{stated.dtype} of {list(stated.shape)}", "two integers")
        return None
    return _with_scale(stem, codes, (rows, columns), scale, "INT4", blocks, book, stated_shape=stated)


def _with_scale(
    name: str,
    codes: TensorEntry,
    shape: Sequence[int],
    scale: TensorEntry,
    coding: Coding,
    blocks: Sequence[tuple[int, int]],
    book: FaultBook,
    *,
    transposed: bool = False,
    stated_shape: TensorEntry | None = None,
) -> QuantizedTensor | None:
    """The weight, if its scale has a number for each block of one of the sizes `blocks`; None, and a fault, if not."""
    if scale.dtype in _SCALE_DTYPES or (scale.dtype == "U8" and coding != "INT4"):
        *lead, rows, columns = shape
        if transposed:
            rows, columns = columns, rows
        block = next((one for one in blocks if _is_grid(scale.shape, tuple(lead), rows, columns, one)), None)
        if block is not None:
            return QuantizedTensor(
                name=name,
                shape=tuple(shape),
                codes=codes,
                scale=scale,
                coding=coding,
                block=block,
                transposed=transposed,
                stated_shape=stated_shape,
            )
    wanted = " or ".join(f"{rows} x {columns}" for rows, columns in dict.fromkeys(blocks))
    book.add(
        "scales-do-not-fit",
        "the scales of a quantised weight do not fit its codes",
        scale.name,
        got=f"{scale.dtype} of {list(scale.shape)}, for codes of {list(codes.shape)}",
        expected=f"{', '.join(_SCALE_DTYPES)}; one for each block of {wanted}",
        next="fetch the checkpoint again; or correct quantization_config in config.json",
    )
    return None


def _is_grid(found: tuple[int, ...], lead: tuple[int, ...], rows: int, columns: int, block: tuple[int, int]) -> bool:
    """Whether a scale of shape `found` has one number for each block; a dimension of 1 at the end may be left out."""
    height, width = -(-rows // block[0]), -(-columns // block[1])
    if found == (*lead, height, width):
        return True
    if width > 1:
        return False
    return found == (*lead, height) or (height == 1 and (found == lead or (not lead and found == (1,))))


def _no_scale(book: FaultBook, name: str, codes: TensorEntry) -> None:
    book.add(
        "scale-missing",
        "a quantised weight has no scale",
        name,
        got=f"{codes.dtype} of {list(codes.shape)}, and no scale",
        expected="a scale next to the codes, in any file of the checkpoint",
        next="fetch the checkpoint again",
    )


def _odd(book: FaultBook, name: str, got: str, expected: str) -> None:
    book.add(
        "not-understood-codes",
        "the codes of a quantised weight are not understood",
        name,
        got=got,
        expected=expected,
        next="use the model's checkpoint in bf16",
    )
