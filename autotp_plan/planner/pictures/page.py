"""The page: one HTML file that needs nothing else, neither a network nor a script."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from autotp_plan.planner.pictures import charts
from autotp_plan.planner.pictures.colours import MOST_GROUPS, apart, group_of, num_groups, rules
from autotp_plan.planner.pictures.estimate_file import EstimateFile
from autotp_plan.planner.pictures.facts import picture
from autotp_plan.planner.pictures.markup import Markup, data_text, plain, tag
from autotp_plan.planner.pictures.model_part import model_section
from autotp_plan.planner.plan_table import Summary, TableRow, computed_in_full, groups, human_bytes, rows, summary
from autotp_plan.planner.stream_words import stream_words
from autotp_plan.schemas.names import some
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.plan.stamp import Stamp

MOST_ROWS, MOST_RULES, MOST_ATTRIBUTES = 1000, 60, 24
"""Rows of the table of parameters, rules, and attributes of modules, at most."""
_HATCH = tag(
    "svg",
    tag(
        "defs",
        tag(
            "pattern",
            tag("path", d="M-1 1l2 -2M0 6l6 -6M5 7l2 -2", stroke_width=1.1),
            id="hatch",
            width=6,
            height=6,
            patternUnits="userSpaceOnUse",
        ),
    ),
    class_="defs",
    aria_hidden="true",
)


def page(plan: Plan, estimate: EstimateFile | None = None) -> str:
    """The page of a plan.

    Args:
        plan: the plan.
        estimate: what it costs on a rank, to draw as well.

    Returns:
        HTML. Whatever a plan holds, it is bounded, and a sentence on it says what is left out.
    """
    drawn, totals, table = picture(plan), summary(plan), rows(plan)
    name = plan.model.architecture or plan.model.model_type or "A model without a config"
    style = Markup(data_text("page.css") + rules(num_groups(plan.tp_size)) + _estimate_colours(estimate))
    script = Markup(data_text("page.js"))
    body = (
        _HATCH,
        tag("header", *_header(plan, totals, name)),
        tag(
            "main",
            _section("The weights of each rank", charts.rank_bars(totals), id_="ranks"),
            *_estimate(estimate),
            model_section(drawn),
            _replicated(plan, totals, table),
            _section("The proof", *_proof(plan.verified), id_="proof"),
            _section("The rules that decided", *_rules(table), id_="rules"),
            _section("Every parameter", *_table(plan, len(table)), id_="parameters"),
        ),
        tag("footer", *_footer(plan)),
        tag("script", script),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="generator", content="autotp-plan"),
        tag("title", f"{plain(name)} at TP={plan.tp_size}: tensor-parallel plan"),
        tag("style", style),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, and nothing runs but this style and this script."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in (style, script))
    style_hash, script_hash = hashes
    return f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; base-uri 'none'"


def _estimate_colours(estimate: EstimateFile | None) -> str:
    if estimate is None:
        return ""
    names = {part.what for rank in estimate.ranks for part in rank.at_peak}
    return "".join(f".e{at}{{fill:{colour}}}" for at, colour in enumerate(apart(len(names))))


def _section(title: str, *children: str, id_: str) -> Markup:
    return tag("section", tag("h2", title), *children, id=id_)


def _header(plan: Plan, totals: Summary, name: str) -> Iterator[Markup]:
    most = max(totals.per_rank)
    dtypes = some(sorted({entry.dtype for entry in plan.parameters}), 12)
    yield tag("p", "Tensor-parallel plan", class_="kicker")
    yield tag("h1", plain(name), " ", tag("small", f"at TP={plan.tp_size}"))
    yield tag(
        "p",
        f"{totals.num_parameters:,} parameters in {dtypes}, {human_bytes(totals.total)} in all. "
        f"Of each weight, the part of a rank has the rank's colour.",
        class_="lead",
    )
    yield tag("ul", *_keys(plan.tp_size), class_="keys")
    yield tag(
        "div",
        tag("input", id="search", type="search", placeholder="Search a parameter: layers.7.mlp", aria_label="Search"),
        tag("span", id="found", role="status"),
        tag("button", "Light or dark", id="theme", type="button"),
        class_="tools js",
        hidden=True,
    )
    copies = sum(totals.per_rank) - totals.total
    yield tag(
        "div",
        _tile("On the fullest rank", human_bytes(most), f"{most / max(1, totals.total):.1%} of the model"),
        _tile("An even share", human_bytes(totals.total // plan.tp_size), f"1/{plan.tp_size} of the model"),
        _tile("Held more than once", human_bytes(copies), "of copies over all ranks"),
        _stamp_tile(plan.verified),
        class_="tiles",
    )


def _tile(what: str, number: str, said: str, class_: str | None = None) -> Markup:
    return tag("div", tag("span", what), tag("b", number, class_=class_), tag("span", said))


def _stamp_tile(stamp: Stamp | None) -> Markup:
    if stamp is None:
        return _tile("Proof", "Not verified", "autotp-plan verify proves it", "bad")
    if stamp.seal is None:
        return _tile("Proof", "Not bound", "a stamp of version 0.1", "bad")
    return _tile("Proof", f"{stamp.float64_error:.1e}", "largest error, float64", "good")


def _keys(tp_size: int) -> Iterator[Markup]:
    groups_ = num_groups(tp_size)
    shown = range(groups_) if groups_ <= 16 else sorted({round(at * (groups_ - 1) / 8) for at in range(9)})
    for group in shown:
        if tp_size <= MOST_GROUPS:
            label = f"rank {group}"
        else:
            of = [rank for rank in range(tp_size) if group_of(rank, tp_size) == group]
            label = f"ranks {of[0]} to {of[-1]}"
        yield tag("li", charts.swatch(f"r{group}"), label)
    both = tag(
        "svg",
        *(tag("rect", class_=one, x=0, y=0, width=12, height=12) for one in ("all", "hatch")),
        class_="swatch",
        width=12,
        height=12,
        viewBox="0 0 12 12",
    )
    yield tag("li", both, "on every rank")


def _estimate(estimate: EstimateFile | None) -> Iterator[Markup]:
    if estimate is None:
        return
    settings = some([f"{name} {value}" for name, value in estimate.settings], 24)
    yield _section(
        "What a training step takes",
        tag("p", f"Estimated for: {settings}.", class_="how"),
        charts.estimate_chart(estimate),
        tag("div", *charts.estimate_tables(estimate), class_="tables"),
        id_="estimate",
    )


def _replicated(plan: Plan, totals: Summary, table: Sequence[TableRow]) -> Markup:
    whole = sorted((row for row in table if row.share == "all"), key=lambda row: -row.bytes_per_rank)
    copies = sum(totals.per_rank) - totals.total
    children = [
        tag(
            "p",
            f"{human_bytes(totals.replicated)} are replicated in full on every rank. With what several ranks share, "
            f"that makes {human_bytes(copies)} of copies over all ranks.",
        )
    ]
    if in_full := computed_in_full(plan):
        children.append(tag("p", "Computed in full on every rank, so that more ranks make it no faster: ",
                            tag("code", plain(some(in_full, 12), 2000)), "."))  # fmt: skip
    shared = [row for row in table if "some on" in row.share]
    for title, found in (("Replicated", whole), ("On several ranks", shared)):
        if found:
            head = tag("tr", tag("th", title), tag("th", "each rank holds"), tag("th", "on each rank", class_="number"))
            body = [
                tag(
                    "tr",
                    tag("td", plain(row.name), class_="name"),
                    tag("td", row.share),
                    tag("td", human_bytes(row.bytes_per_rank), class_="number"),
                )
                for row in found[:8]
            ]
            children.append(tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll"))
            if len(found) > 8:
                rest = len(found) - 8
                children.append(tag("p", f"and {rest:,} smaller {'entry' if rest == 1 else 'entries'}", class_="note"))
    return _section("What is replicated, and what that costs", *children, id_="replicated")


def _proof(stamp: Stamp | None) -> Iterator[Markup]:
    if stamp is None:
        said = " proves it: it compares every gradient of a small model of the same architecture, dense and sharded."
        yield tag("p", "This plan is not verified. ", tag("code", "autotp-plan verify"), said)
        return
    if stamp.seal is None:
        yield tag("p", "The stamp is of version 0.1: nothing binds it to a proof.", class_="bad")
    rows_ = [
        ("Largest error in float64", f"{stamp.float64_error:.1e}"),
        ("Largest relative error of the DeepSpeed engine in float32", f"{stamp.engine_error:.1e}"),
        ("Attention", some(stamp.attention, 12)),
        ("Versions", some([f"{name} {version}" for name, version in stamp.versions.items()], 20)),
    ]
    yield tag(
        "p", "A small model of the same architecture was run dense and sharded by this plan, and all numbers compared."
    )
    yield tag("table", tag("tbody", *(tag("tr", tag("td", name), tag("td", plain(value))) for name, value in rows_)))


def _rules(table: Sequence[TableRow]) -> Iterator[Markup]:
    decided: dict[str, list[TableRow]] = defaultdict(list)
    for row in table:
        decided[row.rule or "none"].append(row)
    head = tag("tr", *(tag("th", name) for name in ("rule", "parameters", "decided")))
    ordered = sorted(decided.items(), key=lambda one: -sum(row.bytes_per_rank for row in one[1]))
    body = [
        tag(
            "tr",
            tag("td", plain(rule)),
            tag("td", f"{sum(row.count for row in of):,}", class_="number"),
            tag("td", some([plain(row.name, 90) for row in of[:3]] + [""] * (len(of) - 3), 3), class_="name"),
        )
        for rule, of in ordered[:MOST_RULES]
    ]
    yield tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")
    if len(ordered) > MOST_RULES:
        yield tag("p", f"and {len(ordered) - MOST_RULES:,} rules that decided less", class_="note")


def _table(plan: Plan, num_rows: int) -> Iterator[Markup]:
    titles = ("parameter", "shape", "style", "each rank holds", "per rank", "rule")
    numbers = ("shape", "per rank")
    head = tag("tr", *(tag("th", title, class_="number" if title in numbers else None) for title in titles))
    body: list[Markup] = []
    left = MOST_ROWS
    for prefix, of in groups(plan):
        if left <= 0:
            break
        if prefix:
            body.append(tag("tr", tag("td", plain(prefix), class_="name", colspan=6), class_="prefix"))
        body += [_row(row, prefix) for row in of[:left]]
        left -= len(of)
    yield tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_="every"), class_="scroll")
    if num_rows > MOST_ROWS:
        yield tag("p", f"The first {MOST_ROWS:,} of {num_rows:,} entries; `autotp-plan show` lists all.", class_="note")


def _row(row: TableRow, prefix: str) -> Markup:
    return tag(
        "tr",
        tag("td", plain(row.name.removeprefix(prefix)), class_="name"),
        tag("td", row.shape.replace(" x ", " \u00d7 "), class_="number"),
        tag("td", row.style),
        tag("td", row.share),
        tag("td", human_bytes(row.bytes_per_rank), class_="number"),
        tag("td", plain(row.rule)),
        data_name=plain(row.name),
    )


def _footer(plan: Plan) -> Iterator[Markup]:
    if plan.model.repository is not None:
        yield tag("p", f"Compiled from {plain(str(plan.model.repository))}.")
    if plan.rules is not None:
        yield tag("p", f"Compiled by {plain(str(plan.rules))}.")
    if plan.dequantize is not None:
        yield tag("p", f"The checkpoint has weights of {plain(str(plan.dequantize))}.")
    said = stream_words(plan)
    if said is not None:
        yield tag("p", f"{plain(said[:1].upper() + said[1:], 1200)}.")
    for attribute in plan.module_attributes[:MOST_ATTRIBUTES]:
        values = some(sorted({str(value) for value in attribute.values}), 8)
        value = f"{plain(attribute.module)}.{plain(attribute.attribute)} = {values}"
        yield tag("p", "Set on each rank: ", tag("code", value))
    if len(plan.module_attributes) > MOST_ATTRIBUTES:
        yield tag("p", f"and {len(plan.module_attributes) - MOST_ATTRIBUTES:,} more")
    for note in plan.notes[:12]:
        yield tag("p", f"Note: {plain(note, 600)}")
    if len(plan.notes) > 12:
        yield tag("p", f"and {len(plan.notes) - 12:,} more notes")
    yield tag("p", "Plan ", tag("code", plan.fingerprint))
