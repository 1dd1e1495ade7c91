"""Codes and scales to values: value = code * scale in float32, then rounded to the dtype that is asked for.

E4M3 is the float8_e4m3fn of the OCP 8-bit floating point specification (no infinities, 0x7f and 0xff are NaN), E2M1 and
E8M0 are those of the OCP microscaling (MX) specification. Needs numpy; nothing is imported from here before a weight is
read.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from autotp_plan.dequantize.quantized_tensor import Coding

Array = np.ndarray[Any, Any]

BITS = {"E4M3": 8, "FP4": 4, "INT4": 4}
STORED_AS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""How an array holds values of a dtype; numpy has no bf16."""

_TABLE_BLOCK = 8192
"""Values with one scale from which on it pays to compute the 256 values that there can be, and to look them up."""

_IN_CACHE = 64 * 1024
"""Values that are computed at a time: what is computed for them on the way stays in the processor's cache."""
_SIDE = 256
_NAN = np.float32(np.nan)


def scales_of(dtype: str, raw: Array) -> Array:
    """Scales in float32, or powers of two as the bytes that they are.

    Args:
        dtype: in safetensors' words; F8_E8M0 and U8 are powers of two.
        raw: the bytes, uint8.
    """
    if dtype in ("F8_E8M0", "U8"):
        return raw
    if dtype == "BF16":
        found = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        found = raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
    found[np.isnan(found)] = _NAN  # one with other bits would not be rounded rightly
    return found


def decode(out: Array, codes: Array, coding: Coding, dtype: str, scales: Array, block: tuple[int, int]) -> None:
    """Fill `out`, `[rows, columns]` of `STORED_AS[dtype]`, with the values of codes.

    Args:
        out: where the values go; it need not be contiguous.
        codes: `[rows, bytes]` in uint8, as many bytes as the columns have.
        coding: what a code means.
        dtype: of the values: BF16, F16 or F32.
        scales: `[block rows, block columns]` as `scales_of` makes them, of the blocks in which `out` lies; its first is
            that of `out[0, 0]`, with whose block `out` begins.
        block: rows and columns of a block.
    """
    rows, columns = out.shape
    if (
        out.strides[1] != out.itemsize and _SIDE % block[1] == 0 and columns > _SIDE
    ):  # transposed: squares stay in cache
        for left in range(0, columns, _SIDE):
            part = slice(left * BITS[coding] // 8, (left + _SIDE) * BITS[coding] // 8)
            decode(out[:, left : left + _SIDE], codes[:, part], coding, dtype, scales[:, left // block[1] :], block)
        return
    factors = scales[: -(-rows // block[0]), : -(-columns // block[1])]
    powers = factors.dtype == np.uint8
    if BITS[coding] == 8 and min(block[0], rows) * min(block[1], columns) >= _TABLE_BLOCK:
        for number, top in enumerate(range(0, rows, block[0])):
            part = slice(top, min(top + block[0], rows))
            _look_up(out[part], codes[part], dtype, as_float32(factors[number]), block[1])
        return
    if block[0] > 1:
        factors = np.repeat(factors, min(block[0], rows), axis=0)[:rows]
    step = max(_IN_CACHE // max(columns, 1), 1)
    for top in range(0, rows, step):
        part = slice(top, top + step)
        if powers and BITS[coding] == 4 and block[1] % 2 == 0:
            _look_up_pairs(out[part], codes[part], coding, dtype, factors[part], block[1] // 2)
        else:
            _multiply(out[part], codes[part], coding, dtype, as_float32(factors[part]), block[1])


def as_float32(scales: Array) -> Array:
    """Scales, powers of two or not, as numbers."""
    return _powers_of_two()[scales] if scales.dtype == np.uint8 else scales


def _look_up_pairs(out: Array, codes: Array, coding: Coding, dtype: str, powers: Array, width: int) -> None:
    """The values of 4-bit codes in which each `width` bytes of a row have one power of two."""
    rows, size = codes.shape
    numbers = codes.astype(np.uint16)
    full = size // width
    if full:
        numbers[:, : full * width].reshape(rows, full, width)[...] |= (powers[:, :full, None].astype(np.uint16)) << 8
    if full * width < size:
        numbers[:, full * width :] |= powers[:, full:].astype(np.uint16) << 8
    pairs = np.take(_pairs(coding, dtype), numbers, mode="clip")
    out[...] = pairs.view(STORED_AS[dtype])


def _look_up(out: Array, codes: Array, dtype: str, factors: Array, width: int) -> None:
    """The values of 8-bit codes in which each `width` columns have one factor."""
    tables = rounded(_values("E4M3") * factors[:, None], dtype)
    step = max(_IN_CACHE // min(width, out.shape[1]), 1)
    for index, table in enumerate(tables):
        columns = slice(index * width, (index + 1) * width)
        for top in range(0, len(out), step):
            rows = slice(top, top + step)
            if out.strides[1] == out.itemsize:
                np.take(table, codes[rows, columns], out=out[rows, columns], mode="clip")
            else:
                out[rows, columns] = np.take(table, codes[rows, columns], mode="clip")


def _multiply(out: Array, codes: Array, coding: Coding, dtype: str, factors: Array, width: int) -> None:
    """The values of codes in which each `width` columns of a row have one factor."""
    rows, columns = out.shape
    values = np.take(_values(coding), codes, mode="clip")
    if BITS[coding] == 4:
        values = values.view(np.float32)
    with np.errstate(all="ignore"):
        full = columns // width
        if full:
            parts = values[:, : full * width].reshape(rows, full, width)
            parts *= factors[:, :full, None]
        if full * width < columns:
            values[:, full * width :] *= factors[:, full:]
    out[...] = rounded(values, dtype)


def rounded(values: Array, dtype: str) -> Array:
    """Float32 values as `STORED_AS[dtype]`, rounded to nearest, ties to even; `values` may be overwritten."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(all="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    bits += odd
    bits += 0x7FFF
    return bits.view(np.uint16)[..., _HIGH::2]


_HIGH = 1  # of the two halves of a float32, in little-endian memory


@functools.cache
def _values(coding: Coding) -> Array:
    """What a byte of codes means: a float32, or of 4-bit codes two in one uint64, the low four bits first."""
    if coding == "E4M3":
        code = np.arange(256)
        exponent, mantissa = code >> 3 & 15, code & 7
        size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
        size[code & 127 == 127] = np.nan
        return np.where(code < 128, size, -size).astype(np.float32)
    if coding == "FP4":
        half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        table = np.array([*half, *(-value for value in half)], np.float32)
    else:
        table = np.arange(-8, 8).astype(np.float32)
    byte = np.arange(256)
    pairs = np.stack([table[byte & 15], table[byte >> 4]], 1)
    found: Array = pairs.view(np.uint64)[:, 0]
    return found


@functools.cache
def _pairs(coding: Coding, dtype: str) -> Array:
    """The two values of each byte of 4-bit codes with each power of two, as one number: `[256 * power + byte]`."""
    values = _values(coding).view(np.float32)
    with np.errstate(all="ignore"):
        table = rounded(_powers_of_two()[:, None] * values, dtype)
    size = table.itemsize * 2
    found: Array = np.ascontiguousarray(table).view(f"u{size}").reshape(-1)
    return found


@functools.cache
def _powers_of_two() -> Array:
    with np.errstate(all="ignore"):
        found: Array = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    found[255] = _NAN
    return found
