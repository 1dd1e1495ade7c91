"""Try every causal language model of transformers: planned and proven right, or refused with the reason.

    python -m benchmarks.every_family [--tp 2] [--only olmoe,cohere2] [--output docs/families.md]

A twin of each is run (see `autotp-plan verify`), of the config in `plans/` where there is one, else of the default one.
Nothing may be wrong, and nothing may be whole where it should be cut.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")


PLANS = Path(__file__).parent.parent / "autotp_plan" / "plans"
MISSING_DEFAULTS = {"dbrx": {"attn_config": {"rope_theta": 500000.0, "clip_qkv": 8.0}}}
"""What a default config must have, and has not, for transformers to build its model."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family: `right`, `refused` or `not built`; by which rules, how far off, or why not."""

    family: str
    outcome: str
    rules: str = ""
    error: float | None = None
    share: float | None = None
    reason: str = ""
    seconds: float = 0.0

    def row(self) -> str:
        """A line of the table."""
        share = f"{self.share:.2f}" if self.share is not None else ""
        error = f"{self.error:.0e}" if self.error is not None else ""
        reason = self.reason.replace("*", "\\*")  # in names, not emphasis
        return f"| {self.family} | {self.outcome} | {self.rules} | {share} | {error} | {reason} |"


def main() -> None:
    """Try the families and print, or write, the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    outcomes = []
    for family in families():
        if arguments.only and family not in arguments.only.split(","):
            continue
        outcomes.append(attempt(family, arguments.tp))
        print(outcomes[-1].row(), f"{outcomes[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    text = table(outcomes, arguments.tp)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


def families() -> list[str]:
    """The model types for which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def attempt(family: str, tp_size: int) -> Outcome:
    """Compile and prove a plan of the family's default config."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_config(family, Path(folder))
        except Exception as error:  # transformers raises anything
            return Outcome(family=family, outcome="not built", reason=brief(f"{type(error).__name__}: {error}"))
        found = plan_and_prove(family, Path(folder), tp_size)
    return Outcome(**{**found, "family": family, "seconds": time.monotonic() - started})


def write_config(family: str, folder: Path) -> None:
    """A public model's config where `plans/` has one, else the family's default."""
    public = [path for path in PLANS.glob("*/config.json") if json.loads(path.read_text())["model_type"] == family]
    if public:
        (folder / "config.json").write_text(sorted(public)[0].read_text())
        return
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(family)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    values = json.loads(config.to_json_string(use_diff=False))
    for section, missing in MISSING_DEFAULTS.get(family, {}).items():
        values[section].update(missing)
    values["architectures"] = [architecture if isinstance(architecture, str) else architecture[0]]
    (folder / "config.json").write_text(json.dumps(values))


def plan_and_prove(family: str, folder: Path, tp_size: int) -> dict[str, Any]:
    """The outcome of compiling the config in `folder`."""
    from autotp_plan.inference.infer import infer_rules
    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.plan_table import summary
    from autotp_plan.planner.rules.preset_files import preset_names, read_preset
    from autotp_plan.runtime.verify.run import try_plan, verify_plan
    from autotp_plan.schemas.errors import AutoTPError, CheckpointError, CompileError
    from autotp_plan.schemas.plan.rule_ref import Origin

    preset = next((name for name in preset_names() if family in read_preset(name).model_types), None)
    uneven = ""
    try:
        try:
            plan = compile_plan(folder, tp_size=tp_size, prove=try_plan, infer=infer_rules)
        except CompileError as error:
            if "does not divide" not in error.faults[0].what:
                raise
            plan = compile_plan(folder, tp_size=tp_size, prove=try_plan, infer=infer_rules, uneven=True)
            uneven = ", uneven"
        proof = verify_plan(plan)
    except CheckpointError as error:
        return {"outcome": "not built", "reason": brief(reason(error))}
    except AutoTPError as error:
        return {"outcome": "refused", "rules": f"preset {preset}" if preset else "", "reason": brief(reason(error))}
    except Exception as error:  # a bug of ours: the table shows it
        return {"outcome": "CRASHED", "reason": brief(f"{type(error).__name__}: {error}")}
    totals = summary(plan)
    inferred = any(entry.rule.origin is Origin.INFERENCE for entry in plan.parameters)
    rules = (f"preset {preset}" if preset else "inference" if inferred else "tp_plan") + uneven
    return {
        "outcome": "right" if proof.proven else "WRONG",
        "rules": rules,
        "error": proof.float64_error,
        "share": max(totals.per_rank) / totals.total,
        "reason": "" if proof.proven else brief(str(proof.failure)),
    }


def reason(error: Any) -> str:
    """What a refusal says, in a line."""
    fault = error.faults[0]
    return f"{fault.what}: {fault.got}"


def brief(text: str) -> str:
    """One line that fits a table."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 200 else line[:197] + "..."


def table(outcomes: list[Outcome], tp_size: int) -> str:
    """The page."""
    import transformers

    counts = {kind: sum(o.outcome == kind for o in outcomes) for kind in dict.fromkeys(o.outcome for o in outcomes)}
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    lines = [
        "# Every causal language model of transformers",
        "",
        f"Written by `python -m benchmarks.every_family --tp {tp_size}` with transformers {transformers.__version__}. "
        "Each family's config (from `plans/`, or else the default) is planned. Where that gives a plan, the plan is "
        "proven on a small model, as `autotp-plan verify` does. `share` is the fraction of the model that a rank holds "
        f"(everything sharded evenly: {1 / tp_size:.2f}), `error` the largest in float64.",
        "",
        f"{len(outcomes)} families: {counted}.",
        "",
        '<div class="reasons" markdown>',
        "",
        "| family | outcome | rules | share | error | why |",
        "|---|---|---|---|---|---|",
        *(outcome.row() for outcome in outcomes),
        "",
        "</div>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
