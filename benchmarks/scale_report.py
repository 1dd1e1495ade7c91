"""What `benchmarks.scale` found, for people: a page of tables, each with what follows from it, and two charts.

All numbers of the page are taken or computed from the report; sentences are chosen by it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale_chart import chart

GIB, TERA = 2**30, 1e12
COLUMNS = {
    # figure: head, in units of
    "weights": ("weights GiB", GIB),
    "kept": ("kept GiB", GIB),
    "peak": ("peak GiB", GIB),
    "forward_operations": ("forward TFLOP", TERA),
    "backward_operations": ("backward TFLOP", TERA),
    "collectives": ("all-reduces", 1),
    "collective_bytes": ("GiB all-reduced", GIB),
}
HEADS = {
    "tp": "TP", "dp": "DP", "layers": "layers", "width": "width", "length": "length", "micro_batch": "micro-batch",
    "experts": "experts", "checkpointing": "length, checkpointing",
}  # fmt: skip

Report = dict[str, Any]
Row = dict[str, Any]
"""The figures of a setting, and the setting."""


def rows(report: Report, family: str, sweep: str) -> list[Row]:
    """A sweep, in its order."""
    found = {json.dumps(one["setting"]): one["figures"] for one in report["cells"] if one["family"] == family}
    return [{**found[json.dumps(one)], **one} for one in report["sweeps"][family][sweep]]


def number(value: float) -> str:
    """Three digits, and no fewer than those before the point."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def percent(part: float) -> str:
    """A share of one."""
    return f"{100 * part:.1f} %"


def table(report: Report, family: str, sweep: str) -> list[str]:
    """A sweep as a table in Markdown."""
    further = FURTHER.get(sweep, {})
    lines = [[HEADS[sweep], *(head for head, _ in COLUMNS.values()), *further]]
    found = rows(report, family, sweep)
    for row in found:
        figures = [number(row[name] / unit) for name, (_, unit) in COLUMNS.items()]
        lines.append([label(row, sweep), *figures, *(compute(row, found) for compute in further.values())])
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|---:" * len(lines[0]) + "|", *body]


def label(row: Row, sweep: str) -> str:
    """What a row is of."""
    if sweep == "checkpointing":
        return f"{row['length']}, {'on' if row['checkpointing'] else 'off'}"
    return str(row[sweep])


def zero(stage: int) -> Callable[[Row, list[Row]], str]:
    """Weights, gradients and states of Adam in mixed precision: 2, 2 and 12 bytes, each divided from its stage on."""

    def held(row: Row, _: list[Row]) -> str:
        parts = ((3, 2), (2, 2), (1, 12))
        each = sum(size / (row["dp"] if stage >= first else 1) for first, size in parts)
        return number(row["weights"] / 2 * each / GIB)

    return held


def quadratic(found: list[Row], name: str) -> float:
    """`b` of `a T + b T^2`, by the first two rows, the second twice as long."""
    first, second = found[:2]
    return float(second[name] - 2 * first[name]) / (2 * first["length"] ** 2)


def attention(row: Row, found: list[Row]) -> str:
    """The part of the forward's operations that is quadratic in the length."""
    return percent(quadratic(found, "forward_operations") * row["length"] ** 2 / row["forward_operations"])


def per_byte(row: Row, _: list[Row]) -> str:
    """Operations for each byte that is all-reduced."""
    both = row["forward_operations"] + row["backward_operations"]
    return number(both / row["collective_bytes"]) if row["collective_bytes"] else "-"


FURTHER: dict[str, dict[str, Callable[[Row, list[Row]], str]]] = {
    "tp": {"FLOP a byte": per_byte},
    "dp": {f"ZeRO {stage} GiB": zero(stage) for stage in range(4)},
    "width": {"FLOP a byte": per_byte},
    "length": {"attention": attention},
}


def times(found: list[Row], name: str) -> str:
    """How a figure grew over a sweep."""
    ratio = found[-1][name] / found[0][name]
    return f"{ratio:.{2 if ratio < 10 else 1}f} times"


def gib(size: float) -> str:
    """Bytes, in words."""
    return f"{number(size / GIB)} GiB" if size >= GIB else f"{number(size / 2**20)} MiB"


def tp(found: list[Row], base: Row) -> str:
    one, two, four, *_, last = found
    replicated = (4 * four["weights"] - one["weights"]) / 3
    fixed = 2 * four["kept"] - two["kept"]
    sharded = 2 * (two["kept"] - fixed)
    copies = fixed / (base["layers"] * base["length"] * base["width"] * 2)
    assert two["collective_bytes"] == four["collective_bytes"]
    shared = next(row for row in found if row["collectives"] > two["collectives"])
    experts = ", and the inputs and outputs of the experts of each token" * bool(base["experts"])
    return (
        f"Weights and operations are divided by TP, but for {gib(replicated)} of replicated weights (at TP=4). What is "
        f"kept is not: by the rows of TP=2 and 4 it is {gib(fixed)} + {gib(sharded)} / TP, which makes "
        f"{gib(fixed + sharded / last['tp'])} at TP={last['tp']}, where {gib(last['kept'])} were found. The first "
        f"part, {number(copies)} tensors of tokens x width in bf16 for each layer, is what every rank has in full: the "
        f"residual stream and what norms keep{experts}. The all-reduced bytes do not shrink either, so a rank has less "
        f"and less to compute for each. From TP={shared['tp']} on there are more ranks than KV heads: the gradients of "
        f"the heads that ranks share are {shared['collectives'] - two['collectives']} all-reduces more."
    )


def dp(found: list[Row], _: Row) -> str:
    assert all(len({row[name] for row in found}) == 1 for name in COLUMNS), "DP changes a forward and backward"
    first, last = found[0], found[-1]
    return (
        f"DP changes nothing in a rank's forward and backward; a step has {first['dp'] * first['length']} tokens at "
        f"DP={first['dp']} and {last['dp'] * last['length']} at DP={last['dp']}. What it can divide is weights, "
        "gradients and the optimizer's states. The last columns are [ZeRO's "
        "arithmetic](https://arxiv.org/abs/1910.02054), not from a run: 2 + 2 + 12 bytes a parameter, under stage 3 "
        f"from {zero(3)(first, found)} to {zero(3)(last, found)} GiB. The {gib(first['kept'])} that are kept for the "
        "backward are divided by no stage."
    )


def layers(found: list[Row], _: Row) -> str:
    def parts(name: str) -> tuple[float, float]:
        first, second = found[:2]
        each = (second[name] - first[name]) / (second["layers"] - first["layers"])
        return each, first[name] - each * first["layers"]

    for name in COLUMNS.keys() - {"peak"}:
        each, rest = parts(name)
        assert all(math.isclose(each * row["layers"] + rest, row[name], rel_tol=1e-4) for row in found), name
    (weights, other_weights), (kept, other_kept), (sums, other_sums) = map(parts, ("weights", "kept", "collectives"))
    return (
        f"All but the peak are lines: each layer has {gib(weights)} of weights, keeps {gib(kept)} and makes "
        f"{number(sums)} all-reduces. Embedding, head and loss have {gib(other_weights)} of weights, keep "
        f"{gib(other_kept)} and make {number(other_sums)} all-reduces, whatever the depth."
    )


def width(found: list[Row], _: Row) -> str:
    first, last = found[0], found[-1]
    wider = last["width"] // first["width"]
    return (
        f"A width {wider} times as large, with as many times the heads, has {times(found, 'weights')} the weights and "
        f"{times(found, 'forward_operations')} the operations: products of layers grow with the square ({wider**2}), "
        f"attention, embedding, head, and KV heads, whose number stays, do not. It keeps {times(found, 'kept')} as "
        f"much, and all-reduces {times(found, 'collective_bytes')} the bytes. So a rank computes "
        f"{per_byte(first, found)} FLOP for each byte that it all-reduces in the narrowest model and "
        f"{per_byte(last, found)} in the widest: TP pays in wide models."
    )


def length(found: list[Row], _: Row) -> str:
    first, last = found[0], found[-1]
    pair = quadratic(found, "forward_operations")
    token = first["forward_operations"] / first["length"] - pair * first["length"]
    for row in found:
        assert math.isclose((token + pair * row["length"]) * row["length"], row["forward_operations"], rel_tol=1e-9)
    each = {number(row["kept"] / row["length"] / 2**20) for row in found}
    return (
        f"The forward makes {number(token / 1e9)} GFLOP for each token and, in attention, {number(pair / 1e3)} kFLOP "
        f"for each pair of tokens: all rows are this sum. Attention is {attention(first, found)} of it at "
        f"{first['length']} tokens and {attention(last, found)} at {last['length']}. It keeps no matrix of all pairs, "
        f"so {' to '.join(sorted(each))} MiB are kept for each token at any length. All-reduces grow in bytes, not in "
        "number."
    )


def micro_batch(found: list[Row], _: Row) -> str:
    first, last = found[0], found[-1]
    assert first["collectives"] == last["collectives"]
    return (
        f"{last['micro_batch']} sequences at a time make {times(found, 'forward_operations')} the operations of one, "
        f"keep {times(found, 'kept')} as much and all-reduce {times(found, 'collective_bytes')} the bytes, in as many "
        f"all-reduces. Weights and gradients stay as they are, so the peak is {times(found, 'peak')} as high."
    )


def experts(found: list[Row], _: Row) -> str:
    first, last = found[0], found[-1]
    more = number(last["experts"] / first["experts"])
    return (
        f"{more} times the experts, of which a token still takes 8, have {times(found, 'weights')} the weights and "
        f"{times(found, 'forward_operations')} the operations: only the router's grow. Weights and gradients make the "
        f"peak {times(found, 'peak')} as high. What is kept grows {times(found, 'kept')}, and what is all-reduced "
        f"{times(found, 'collective_bytes')}."
    )


def checkpointing(found: list[Row], base: Row) -> str:
    off, on, long_off, long_on = found
    again = (on["backward_operations"] - off["backward_operations"]) / off["forward_operations"]
    inputs = base["layers"] * base["length"] * base["width"] * 2
    return (
        f"{gib(on['kept'])} instead of {gib(off['kept'])} are kept, of which {gib(inputs)} are the inputs of layers; "
        f"at {long_on['length']} tokens {gib(long_on['kept'])} instead of {gib(long_off['kept'])}. The backward makes "
        f"{percent(again)} of the forward's operations again (not those of the head, nor what follows the last tensor "
        f"that a layer keeps) and {on['collectives'] - off['collectives']} of its all-reduces."
    )


SECTIONS: dict[str, tuple[str, Callable[[list[Row], Row], str]]] = {
    "tp": ("Tensor-parallel ranks", tp),
    "dp": ("Data-parallel ranks", dp),
    "layers": ("Layers", layers),
    "width": ("Width", width),
    "experts": ("Experts", experts),
    "length": ("Sequence length", length),
    "micro_batch": ("Micro-batch", micro_batch),
    "checkpointing": ("Activation checkpointing", checkpointing),
}


def page(report: Report) -> str:
    """The report as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    kinds = {kind for one in report["cells"] for kind in one["figures"]["kinds"]}
    devices = " and ".join(sorted({one["figures"]["device"] for one in report["cells"]}))
    assert kinds == {"allreduce_ tensor"}, kinds
    lines = [
        "# How cost grows",
        "",
        f"Written by `python -m benchmarks.scale` on {report['date']}, in {report['seconds']} s, on CPU.",
        f"{versions}.",
        "",
        "A plan is enough to run one rank of a job of any size on tensors without data. Each row below is a forward",
        "and backward of rank 0: the code of transformers' model, sharded by its plan through the runtime, in bf16.",
        "One setting is changed at a time. The others are",
        "",
        *(f"- {report['models'][family]}: {base_line(base)}." for family, base in report["base"].items()),
        "",
        "| column | what it is |",
        "|---|---|",
        "| weights | those that the rank holds |",
        "| kept | what the forward leaves for the backward |",
        "| peak | the most that is alive at a time: weights, buffers, what forward and backward make, and gradients, "
        "which stay until the end; not the optimizer's states |",
        "| TFLOP | 10^12 floating-point operations of products and attention, which counts as if it had no mask |",
        "| all-reduces | of the tensor-parallel group in forward and backward, which have no other collectives |",
        "| GiB all-reduced | the tensors that they sum, together |",
        "",
        f"The tensors are on the device `{devices}`: what attention keeps depends on its kernel. The charts show each",
        "figure by that of the settings above. Where lines coincide, the thinner one lies on the broader one.",
        "",
        *(
            f"![{name}: figures by setting, as lines](scale-{family}.svg)\n"
            for family, name in report["models"].items()
        ),
    ]
    for sweep, (title, conclude) in SECTIONS.items():
        lines += [f"## {title}", ""]
        for family, name in report["models"].items():
            if sweep in report["sweeps"][family]:
                sentence = conclude(rows(report, family, sweep), report["base"][family])
                lines += [f"{name}:", "", *table(report, family, sweep), "", sentence, ""]
    return "\n".join(lines)


def base_line(base: Row) -> str:
    """The settings that are not changed, in a line."""
    words = {
        "layers": "layers", "width": "wide", "experts": "experts", "length": "tokens in a sequence",
        "micro_batch": "sequence at a time",
    }  # fmt: skip
    sizes = ", ".join(f"{base[key]} {word}" for key, word in words.items() if base[key])
    return f"{sizes}, TP={base['tp']}, DP={base['dp']}, no activation checkpointing"


def write(report: Report, folder: Path) -> None:
    """scale.json, scale.md and a chart of each family in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "scale.md").write_text(page(report))
    for family, name in report["models"].items():
        found = {sweep: rows(report, family, sweep) for sweep in report["sweeps"][family]}
        (folder / f"scale-{family}.svg").write_text(chart(name, report["base"][family], found))
