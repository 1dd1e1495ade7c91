"""Which rows and columns of a matrix are asked for: spans of elements as rectangles. Integers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from autotp_plan.schemas.storage.files import Span


class Rectangle(NamedTuple):
    """`rows` by `columns` elements of a matrix, from row `row` and column `column` on."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def at_blocks(self, block: tuple[int, int]) -> Iterator[tuple[Rectangle, int, int]]:
        """At most four parts, each of which begins where a block does or lies in one block row or column.

        Yields:
            A part, and the row and column of the rectangle where it begins.
        """
        for top, rows in _split(self.row, self.rows, block[0]):
            for left, columns in _split(self.column, self.columns, block[1]):
                yield Rectangle(self.row + top, self.column + left, rows, columns), top, left


def _split(start: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """What comes before the first multiple of `size`, and the rest: `(offset, length)`; each only if there is some."""
    before = min(-start % size, length)
    if before:
        yield 0, before
    if length > before:
        yield before, length - before


def rectangles(spans: Iterable[Span], width: int) -> Iterator[Rectangle]:
    """Spans of elements of a matrix that is `width` wide, as rectangles whose elements come in the order of the spans.

    Args:
        spans: of elements, from the first of the matrix on; those of the same columns of rows that follow each other
            become one rectangle.
        width: columns.
    """
    last: Rectangle | None = None
    for start, length in spans:
        for found in _of_span(start, length, width):
            if last is None:
                last = found
            elif (found.row, found.column, found.columns) == (last.row + last.rows, last.column, last.columns):
                last = Rectangle(last.row, last.column, last.rows + found.rows, last.columns)
            else:
                yield last
                last = found
    if last is not None:
        yield last


def _of_span(start: int, length: int, width: int) -> Iterator[Rectangle]:
    """A span as the end of a row, full rows, and the beginning of a row."""
    row, column = divmod(start, width)
    if column or length < width:
        first = min(length, width - column)
        if first:
            yield Rectangle(row, column, 1, first)
        row, length = row + 1, length - first
    if length >= width:
        yield Rectangle(row, 0, length // width, width)
        row, length = row + length // width, length % width
    if length:
        yield Rectangle(row, 0, 1, length)
