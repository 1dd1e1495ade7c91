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

_TABLE_BLOCK = 1024
"""Values with one scale from which on it pays to compute the 256 values that there can be, and to look them up."""
_NAN = np.float32(np.nan)


def scales_of(dtype: str, raw: Array) -> Array:
    """Scales in float32.

    Args:
        dtype: in safetensors' words; F8_E8M0 and U8 are powers of two.
        raw: the bytes, uint8.
    """
    if dtype in ("F8_E8M0", "U8"):
        return _powers_of_two()[raw]
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
        scales: `[block rows, block columns]` in float32, of the blocks in which `out` lies; its first is that of
            `out[0, 0]`, with whose block `out` begins.
        block: rows and columns of a block.
    """
    rows, columns = out.shape
    factors = scales[: -(-rows // block[0]), : -(-columns // block[1])]
    if BITS[coding] == 8 and min(block[0], rows) * min(block[1], columns) >= _TABLE_BLOCK:
        for number, top in enumerate(range(0, rows, block[0])):
            part = slice(top, min(top + block[0], rows))
            _look_up(out[part], codes[part], dtype, factors[number], block[1])
    else:
        if block[0] > 1:
            factors = np.repeat(factors, min(block[0], rows), axis=0)[:rows]
        _multiply(out, codes, coding, dtype, factors, block[1])


def _look_up(out: Array, codes: Array, dtype: str, factors: Array, width: int) -> None:
    """The values of 8-bit codes in which each `width` columns have one factor."""
    tables = rounded(_values("E4M3") * factors[:, None], dtype)
    for index, table in enumerate(tables):
        columns = slice(index * width, (index + 1) * width)
        if out.strides[1] == out.itemsize:
            np.take(table, codes[:, columns], out=out[:, columns], mode="clip")
        else:
            out[:, columns] = np.take(table, codes[:, columns], mode="clip")


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
def _powers_of_two() -> Array:
    with np.errstate(all="ignore"):
        found: Array = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    found[255] = _NAN
    return found
