"""Which bytes of a whole tensor lie where: pure integer arithmetic, for writing files out of pieces of other files.

A `Part` is what one place (a rank's shard, or the tensors of a checkpoint) holds of a tensor; a `Move` is a tensor with
the parts it is read from and those it is written to. Nothing here opens a file.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autotp_plan.schemas import intervals as iv
from autotp_plan.schemas.layout import Layout
from autotp_plan.schemas.storage.byte_ranges import Segments
from autotp_plan.schemas.storage.safetensors_header import BITS

Piece = tuple[int, int, int]
"""`(position in a block of the whole, position in a block of the part, length)`, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """`count` rows of `length` bytes: in the whole from `whole` on, in a span from `at` on."""

    whole: int
    at: int
    length: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Bytes `[start, start + length)` of a part, and the runs of the whole that they consist of."""

    start: int
    length: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one place holds of a tensor.

    The whole is blocks of `stride` bytes, of each of which the part holds `pieces` (ascending in the whole), which make
    `local` bytes of `segments`.
    """

    segments: Segments
    stride: int
    local: int
    pieces: tuple[Piece, ...]

    def spans(self, start: int, stop: int) -> list[Span]:
        """Where the part has bytes `[start, stop)` of the whole, in as few spans as can be, ascending in the part."""
        spans: list[Span] = []
        while start < stop:
            block, inside = divmod(start, self.stride)
            count = (stop - start) // self.stride
            if inside == 0 and count > 0:
                spans += self._whole_blocks(block, count)
                start += count * self.stride
            else:
                end = min(stop, (block + 1) * self.stride)
                spans += self._part_of_block(block, inside, end - block * self.stride)
                start = end
        return _joined(spans)

    def _whole_blocks(self, block: int, count: int) -> Iterator[Span]:
        if self.pieces:
            runs = [
                Run(whole=block * self.stride + whole, at=local, length=length, count=count)
                for whole, local, length in self.pieces
            ]
            yield Span(start=block * self.local, length=count * self.local, runs=tuple(runs))

    def _part_of_block(self, block: int, first: int, last: int) -> Iterator[Span]:
        index = max(0, bisect.bisect_right(self.pieces, (first, math.inf, 0)) - 1)
        while index < len(self.pieces) and self.pieces[index][0] < last:
            whole, local, length = self.pieces[index]
            start, stop = max(whole, first), min(whole + length, last)
            if start < stop:
                run = Run(whole=block * self.stride + start, at=0, length=stop - start, count=1)
                yield Span(start=block * self.local + local + start - whole, length=stop - start, runs=(run,))
            index += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A tensor of `size` bytes: the parts it is read from, which hold each byte once, and those it is written to."""

    size: int
    inputs: tuple[Part, ...]
    outputs: tuple[Part, ...]

    def chunks(self, most: int) -> Iterator[tuple[int, int]]:
        """`[start, stop)` of at most `most` bytes each; whole blocks where that can be, so that pieces are long."""
        stride = max((p.stride for p in (*self.inputs, *self.outputs) if 0 < p.stride <= most), default=1)
        step = most // stride * stride
        for start in range(0, self.size, step):
            yield start, min(start + step, self.size)


def whole(segments: Segments) -> Part:
    """The part that is all of a tensor."""
    return Part(segments=segments, stride=segments.size, local=segments.size, pieces=((0, 0, segments.size),))


def part(layout: Layout, intervals: Sequence[iv.Interval], segments: Segments) -> Part:
    """The part that is `intervals` of the cut dimension of a tensor of `layout`."""
    if layout.dim is None:
        return whole(segments)
    inner = math.prod(layout.shape[layout.dim + 1 :]) * (BITS[segments.dtype] // 8)
    stride = layout.shape[layout.dim] * inner
    pieces: list[Piece] = []
    local = 0
    for start, stop in iv.join_touching(intervals):
        pieces.append((start * inner, local, (stop - start) * inner))
        local += (stop - start) * inner
    if pieces == [(0, 0, stride)]:
        return whole(segments)
    return Part(segments=segments, stride=stride, local=local, pieces=tuple(sorted(pieces)))


def each_byte_once(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts of one layout, without what an earlier one holds too; those of which nothing is left are dropped."""
    for each in parts:
        if each.pieces == ((0, 0, each.stride),):
            return (each,)
    taken: list[iv.Interval] = []
    found: list[Part] = []
    for each in parts:
        left: list[Piece] = []
        for at, local, length in each.pieces:
            for start, stop in _without((at, at + length), taken):
                left.append((start, local + start - at, stop - start))
        taken = sorted([*taken, *((at, at + length) for at, _, length in left)])
        if left:
            found.append(Part(segments=each.segments, stride=each.stride, local=each.local, pieces=tuple(left)))
    return tuple(found)


def _without(interval: iv.Interval, taken: Sequence[iv.Interval]) -> Iterator[iv.Interval]:
    start, stop = interval
    for first, last in taken[max(0, bisect.bisect_right(taken, (start, math.inf)) - 1) :]:
        if first >= stop:
            break
        if start < first:
            yield start, first
        start = max(start, min(last, stop))
    if start < stop:
        yield start, stop


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that touch in the part, made one."""
    if len(spans) < 2:
        return spans
    joined: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if joined and joined[-1][-1].start + joined[-1][-1].length == span.start:
            joined[-1].append(span)
        else:
            joined.append([span])
    return [group[0] if len(group) == 1 else _one(group) for group in joined]


def _one(group: Sequence[Span]) -> Span:
    start = group[0].start
    runs = [
        Run(whole=run.whole, at=span.start - start + run.at, length=run.length, count=run.count)
        for span in group
        for run in span.runs
    ]
    return Span(start=start, length=sum(span.length for span in group), runs=tuple(runs))
