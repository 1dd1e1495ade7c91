"""The page that the checks on a GPU write."""

from __future__ import annotations

from typing import Any

_HEAD = """# On a GPU

Written by `make gpu` (`python -m benchmarks.gpu`). Two tensor-parallel ranks share one card and talk over gloo,
through the memory of the host, because NCCL refuses two ranks of one device. Each number is an error against the
unsharded model on the same card, unless it says otherwise: absolute in float64, relative in float32. What this says is
that the computation is right on CUDA; it says nothing about the speed of several cards, nor about NCCL.
"""


def page(found: dict[str, Any], seconds: float) -> str:
    """Markdown of what all checks found.

    Args:
        found: `machine`, a dict of facts; `checks`, each with `name`, `what`, `ok`, `worst`, `limit`, `figures`,
            `seconds` and `error`.
        seconds: how long all of it took.
    """
    checks = found["checks"]
    failed = [check for check in checks if not check["ok"]]
    lines = [_HEAD]
    lines += [f"- {name}: {value}" for name, value in found["machine"].items()]
    lines += [f"- {len(checks)} checks in {seconds:.0f} s, {len(failed)} failed", ""]
    lines += ["| check | largest error | limit | figures | seconds |", "|---|---|---|---|---|"]
    for check in checks:
        worst = "" if check["worst"] is None else f"{check['worst']:.1e}"
        limit = "" if check["limit"] is None else f"{check['limit']:.0e}"
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in check["figures"].items())
        state = "" if check["ok"] else "**failed** "
        lines.append(f"| {state}{check['name']} | {worst} | {limit} | {figures} | {check['seconds']:.1f} |")
    for check in failed:
        lines += ["", f"`{check['name']}`:", "", "```", *check["error"].strip().splitlines()[-25:], "```"]
    return "\n".join(lines) + "\n"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
