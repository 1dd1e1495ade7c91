"""A weight that is codes and scales on disk: what it becomes, and how its codes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from autotp_plan.schemas.storage.safetensors_header import TensorEntry

Coding = Literal["E4M3", "FP4", "INT4"]
"""E4M3 is a byte per value. Of the others two values are in a byte, the first in the low four bits: FP4 is E2M1, INT4
the value plus 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedTensor:
    """A weight of `shape` whose value is `code * scale`.

    Attributes:
        name: of the weight.
        shape: of the weight.
        codes: a matrix of codes, or several one after the other.
        scale: a number for each `block` of rows and columns of each matrix of codes; blocks at the ends may be smaller.
        coding: what a code means.
        block: rows and columns.
        transposed: the weight has the last two dimensions of the codes exchanged.
        stated_shape: a tensor that holds the shape of the weight, which must be `shape`.
    """

    name: str
    shape: tuple[int, ...]
    codes: TensorEntry
    scale: TensorEntry
    coding: Coding
    block: tuple[int, int]
    transposed: bool = False
    stated_shape: TensorEntry | None = None

    @property
    def rows(self) -> int:
        """Rows of a matrix of codes."""
        return self.shape[-1 if self.transposed else -2]

    @property
    def columns(self) -> int:
        """Columns of a matrix of codes."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def matrices(self) -> int:
        """Matrices of codes."""
        return math.prod(self.shape[:-2])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return (self.codes.stop - self.codes.start) // max(self.matrices * self.rows, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix."""
        return -(-self.rows // self.block[0]), -(-self.columns // self.block[1])

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What is read for it, the codes first."""
        stated = () if self.stated_shape is None else (self.stated_shape,)
        return self.codes, self.scale, *stated
