"""Bars: the bytes of each rank, and the peaks of an estimate. Lengths are in hundred-thousandths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from autotp_plan.planner.pictures import words
from autotp_plan.planner.pictures.colours import group_of
from autotp_plan.planner.pictures.estimate_file import EstimateFile
from autotp_plan.planner.pictures.markup import Markup, join, tag
from autotp_plan.planner.plan_table import Summary, human_bytes
from autotp_plan.schemas.estimate.document import Part, RankEstimate
from autotp_plan.schemas.names import some

MOST_BARS = 16
_WIDTH = 100_000  # a browser does not draw coordinates of billions


def bar(parts: Sequence[tuple[str, int, str]], whole: int, line: int | None = None) -> Markup:
    """A stacked bar.

    Args:
        parts: for each its class, its length, and what a pointer shows.
        whole: the length of the full width.
        line: where a vertical line stands.
    """
    drawn, at = [], 0
    for class_, length, title in parts:
        start, at = at, at + length
        first, last = (place * _WIDTH // max(1, whole) for place in (start, at))
        if first < last:
            drawn.append(tag("rect", tag("title", title), class_=class_, x=first, y=0, width=last - first, height=1))
    if line is not None:
        drawn.append(tag("path", class_="limit", d=f"M{line * _WIDTH // max(1, whole)} -0.3v1.6"))
    return tag("svg", *drawn, class_="bar", viewBox=f"0 0 {_WIDTH} 1", preserveAspectRatio="none", role="img")


def rank_bars(totals: Summary) -> Markup:
    """The bytes of weights on each rank, sharded and replicated; many ranks by what they hold."""
    tp_size = len(totals.per_rank)
    by_size: dict[int, list[int]] = defaultdict(list)
    for rank, held in enumerate(totals.per_rank):
        by_size[held if tp_size > MOST_BARS else rank].append(rank)
    kinds = sorted(by_size.values(), key=lambda ranks: ranks[0])
    if len(kinds) > MOST_BARS:
        kinds = sorted(kinds, key=lambda ranks: -totals.per_rank[ranks[0]])[:MOST_BARS]
    whole = max(totals.per_rank)
    drawn = [join(*_rank_bar(ranks, totals, whole)) for ranks in kinds]
    more = tp_size - sum(map(len, kinds))
    said = [tag("p", f"The fullest are drawn; {more} further ranks hold less.", class_="note")] if more else []
    return join(tag("div", *drawn, class_="bars"), *said)


def _rank_bar(ranks: Sequence[int], totals: Summary, whole: int) -> Iterator[Markup]:
    held = totals.per_rank[ranks[0]]
    one = len(ranks) == 1
    yield tag("span", f"rank {ranks[0]}" if one else f"ranks {words.numbers(ranks)}", class_="what")
    colour = f"r{group_of(ranks[0], len(totals.per_rank))}" if one else "many"
    sharded, replicated = held - totals.replicated, totals.replicated
    yield bar(
        [
            (colour, sharded, f"sharded: {human_bytes(sharded)}"),
            ("all", replicated, f"replicated: {human_bytes(replicated)}"),
        ],
        whole,
    )
    yield tag("span", human_bytes(held), class_="number")


def estimate_chart(estimate: EstimateFile) -> Markup:
    """The peak of each kind of rank as a stacked bar, with a legend, and the memory of a device as a line."""
    names = list(dict.fromkeys(part.what for rank in estimate.ranks for part in rank.at_peak))
    longest = max([rank.peak for rank in estimate.ranks] + [estimate.memory or 0])
    drawn = []
    for rank in estimate.ranks:
        sizes = _sizes(rank.at_peak)
        parts = [(f"e{at}", sizes[name], f"{name}: {human_bytes(sizes[name])}") for at, name in enumerate(names)]
        drawn += [
            tag("span", _ranks(rank), class_="what"),
            bar(parts, longest + longest // 50, estimate.memory),
            tag("span", human_bytes(rank.peak), class_="number"),
        ]
    return join(
        tag("div", *drawn, class_="bars tall"),
        _legend(names, estimate),
        *(tag("p", line, class_="note") for line in _sentences(estimate)),
    )


def _sizes(parts: Sequence[Part]) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for part in parts:
        sizes[part.what] += part.bytes
    return sizes


def _ranks(rank: RankEstimate) -> str:
    return f"rank{'s' if len(rank.tp_ranks) > 1 else ''} {words.numbers(rank.tp_ranks)}"


def _legend(names: Sequence[str], estimate: EstimateFile) -> Markup:
    """A table: each part of the peak with its colour, and its bytes on the fullest rank."""
    fullest = estimate.fullest
    sizes = _sizes(fullest.at_peak)
    rows = [
        tag(
            "tr",
            tag("td", swatch(f"e{at}"), name),
            tag("td", human_bytes(sizes[name]), class_="number"),
            tag("td", f"{sizes[name] / max(1, fullest.peak):.1%}", class_="number"),
        )
        for at, name in enumerate(names)
    ]
    return tag("table", tag("tbody", *rows), class_="legend")


def swatch(class_: str) -> Markup:
    """A small square in a colour."""
    square = tag("rect", class_=class_, x=0, y=0, width=12, height=12)
    return tag("svg", square, class_="swatch", width=12, height=12, viewBox="0 0 12 12", aria_hidden="true")


def _sentences(estimate: EstimateFile) -> Iterator[str]:
    fullest = estimate.fullest
    if fullest.when:
        yield f"The peak of {human_bytes(fullest.peak)} is reached in: {fullest.when}."
    if estimate.memory is not None:
        room = estimate.memory - fullest.peak
        verdict = (
            f"It fits, with {human_bytes(room)} left"
            if room >= 0
            else f"It does not fit: {human_bytes(-room)} too much"
        )
        yield f"{verdict}. The line is at {human_bytes(estimate.memory)}, the memory of a device."
    if not estimate.measured:
        yield "The model's code was not run: these are the plan's numbers alone."
    if estimate.missing:
        yield f"Not in it: {some(estimate.missing, 12)}."
    if operations := fullest.forward_operations + fullest.backward_operations:
        yield f"{operations:.3g} floating-point operations in a step on this rank."


def estimate_tables(estimate: EstimateFile) -> Iterator[Markup]:
    """What the fullest rank holds in each part of the job, has on the host, and sends and receives in a step."""
    fullest = estimate.fullest
    for title, parts in (("most in each part of the job", fullest.phases), ("in the memory of the host", fullest.host)):
        if parts:
            yield _table((title, "bytes"), [(part.what, human_bytes(part.bytes)) for part in parts])
    if fullest.traffic:
        sent = [
            (f"{one.operation} over {_GROUPS.get(one.group, one.group)}", f"{one.count:,}", human_bytes(one.bytes))
            for one in fullest.traffic
        ]
        yield _table(("communicated in a step", "count", "bytes of tensors"), sent)


_GROUPS = {"tensor": "tensor-parallel ranks", "data": "data-parallel ranks", "all": "all ranks"}


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column is text and whose others are numbers."""

    def cells(name: str, row: Sequence[str]) -> Markup:
        return tag("tr", *(tag(name, cell, class_="number" if at else None) for at, cell in enumerate(row)))

    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", cells("th", titles)), body), class_="scroll")
