"""Try every causal language model of transformers: planned and proven right, or refused with the reason.

    python -m benchmarks.every_family [--tp 2] [--only olmoe,cohere2] [--cache FILE] [--again refused] [--output FILE]

A small model of each is run (see `autotp-plan verify`), of the config in `autotp_plan/plans/` where there is one, else
of the default one, completed by `default_values.json` where transformers leaves something out. Nothing may be wrong.
Families that `--cache` holds are not tried again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from autotp_plan.schemas.names import starred
from benchmarks.families_page import page

os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")

PLANS = Path(__file__).parent.parent / "autotp_plan" / "plans"
VALUES = Path(__file__).parent / "default_values.json"
"""What a default config must have, and has not, for transformers to build its model: by family, with the source."""
SECONDS = 400
"""So long a family may take."""
INFERENCE_SECONDS = 150
"""So long inference may take; then transformers' tp_plan is tried."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family.

    Attributes:
        family: the model type.
        outcome: `right`, `WRONG`, `refused` or `CRASHED`.
        rules: what decided: a preset, inference or transformers' tp_plan.
        error: the largest in float64.
        share: bytes of the largest rank over all bytes.
        compute: floating-point operations of the largest rank over the dense model's.
        code: of the fault.
        reason: what the fault says, or what inference notes about what stays replicated.
        replicated: which modules' matrices every rank holds, with their percentage of all bytes.
        seconds: it took.
    """

    family: str
    outcome: str
    rules: str = ""
    error: float | None = None
    share: float | None = None
    compute: float | None = None
    code: str = ""
    reason: str = ""
    replicated: str = ""
    seconds: float = 0.0


def main() -> None:
    """Try the families and print, or write, the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--only", default="", help="families, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time")
    parser.add_argument("--cache", type=Path, help="file of outcomes, a line each, that is read and added to")
    parser.add_argument("--again", default="", help="outcomes in the cache to try again, with commas")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.nice(10)
    chosen = [one for one in families() if not arguments.only or one in arguments.only.split(",")]
    again = arguments.again.split(",")
    known = {one.family: one for one in read_cache(arguments.cache) if one.outcome not in again}
    for outcome in attempts([one for one in chosen if one not in known], arguments.tp, arguments.jobs):
        known[outcome.family] = outcome
        if arguments.cache is not None:
            with arguments.cache.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        print(f"{outcome.family}: {outcome.outcome} {outcome.rules} {outcome.reason[:200]} {outcome.seconds:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
    text = page([known[one] for one in chosen], arguments.tp)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


def families() -> list[str]:
    """The model types for which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read_cache(path: Path | None) -> Iterator[Outcome]:
    """The outcomes in a file; of several of one family the last counts."""
    if path is not None and path.exists():
        yield from (Outcome(**json.loads(line)) for line in path.read_text().splitlines())


def attempts(chosen: list[str], tp_size: int, jobs: int) -> Iterator[Outcome]:
    """The outcomes, in the order in which they are known, by `jobs` processes; one that is too slow is replaced."""
    waiting: Queue[str] = Queue()
    found: Queue[Outcome] = Queue()
    for family in chosen:
        waiting.put(family)
    for _ in range(jobs):
        threading.Thread(target=_supervise, args=(waiting, found, tp_size), daemon=True).start()
    for _ in chosen:
        yield found.get()


def _supervise(waiting: Queue[str], found: Queue[Outcome], tp_size: int) -> None:
    """Have one process try family after family."""
    context = multiprocessing.get_context("spawn")
    process: Any = None
    while True:
        try:
            family = waiting.get_nowait()
        except Empty:
            break
        if process is None:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, tp_size))
            process.start()
            there.close()
        here.send(family)
        try:
            outcome = here.recv() if here.poll(SECONDS) else None
        except EOFError:
            outcome = None
        if outcome is None:
            _end(process)
            process = None
            outcome = Outcome(
                family=family, outcome="refused", code="time", reason=f"no answer within {SECONDS} s", seconds=SECONDS
            )
        found.put(outcome)
    if process is not None:
        _end(process)


def _end(process: Any) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _work(families: Any, tp_size: int) -> None:
    os.setsid()
    while True:
        families.send(attempt(families.recv(), tp_size))


def attempt(family: str, tp_size: int) -> Outcome:
    """Compile and prove a plan of the family's default config."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_config(family, Path(folder))
            found = plan_and_prove(family, Path(folder), tp_size)
        except Exception as error:  # a bug of ours, or what transformers raises: the table shows it
            found = {"outcome": "CRASHED", "reason": _line(f"{type(error).__name__}: {error}")}
    return Outcome(**{**found, "family": family, "seconds": time.monotonic() - started})


def write_config(family: str, folder: Path) -> None:
    """A public model's config where `plans/` has one, else the family's default."""
    public = [path for path in PLANS.glob("*/config.json") if json.loads(path.read_text())["model_type"] == family]
    if public:
        (folder / "config.json").write_text(sorted(public)[0].read_text())
        return
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    added = json.loads(VALUES.read_text()).get(family, {}).get("values", {})
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    architecture = named if isinstance(named, str) else named[0]
    config = AutoConfig.for_model(family, **added)
    values = with_values(json.loads(config.to_json_string(use_diff=False)), added)
    wanted = getattr(transformers, architecture).config_class
    for key, kind in type(config).sub_configs.items():  # of a model of several, the config of its language model
        values = values[key] if not isinstance(config, wanted) and kind is wanted else values
    values["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(values))


def with_values(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A config with these values, those of inner objects too."""
    inner = {
        key: with_values(config[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(config.get(key), dict)
    }
    return {**config, **values, **inner}


def plan_and_prove(family: str, folder: Path, tp_size: int) -> dict[str, Any]:
    """The outcome of compiling the config in `folder`."""
    from autotp_plan.planner import compile_plan
    from autotp_plan.planner.cli.infer import infer_with_limits
    from autotp_plan.planner.plan_table import summary
    from autotp_plan.planner.rules.preset_files import preset_names, read_preset
    from autotp_plan.runtime.verify.report import Proof
    from autotp_plan.runtime.verify.run import Trial, trial_of, verify_plan
    from autotp_plan.schemas.errors import AutoTPError, CompileError
    from autotp_plan.schemas.plan.document import Plan
    from autotp_plan.schemas.plan.rule_ref import Origin
    from autotp_plan.schemas.spec import SpecFile

    preset = next((name for name in preset_names() if family in read_preset(name).model_types), None)
    rules = f"preset {preset}" if preset else ""
    notes: list[str] = []
    proofs: list[Proof] = []

    def prove(plan: Plan) -> Trial:
        proofs.append(verify_plan(plan))
        return trial_of(proofs[-1])

    def infer(where: Path) -> SpecFile:
        spec = infer_with_limits(where, INFERENCE_SECONDS)
        notes.append(spec["description"].partition("inferred from the model itself.")[2].strip())
        return SpecFile.from_dict(spec)

    uneven = ""
    try:
        try:
            plan = compile_plan(folder, tp_size=tp_size, prove=prove, infer=infer)
        except CompileError as error:
            if not any(fault.code == "indivisible" for fault in error.faults):
                raise
            plan = compile_plan(folder, tp_size=tp_size, prove=prove, infer=infer, uneven=True)
            uneven = ", uneven"
        proof = proofs[-1] if proofs else verify_plan(plan)
    except AutoTPError as error:
        fault = min(error.faults, key=lambda one: one.code == "no-preset")
        return {"outcome": "refused", "rules": rules, "code": fault.code or "", "reason": _line(fault.got)}
    totals = summary(plan)
    origins = {entry.rule.origin for entry in plan.parameters}
    inferred = Origin.INFERENCE in origins
    named = "inference" if inferred else "tp_plan" if Origin.TP_PLAN in origins else "preset"
    return {
        "outcome": "right" if proof.proven else "WRONG",
        "rules": (rules or named) + uneven,
        "error": proof.float64_error,
        "share": max(totals.per_rank) / totals.total,
        "compute": proof.compute_share,
        "replicated": ", ".join(replicated(plan)),
        "reason": (notes[-1] if inferred and notes else "") if proof.proven else _line(str(proof.failure)),
    }


def replicated(plan: Any) -> Iterator[str]:
    """The modules whose matrices are replicated and are a percent of the model or more, the largest first."""
    bytes_of: dict[str, int] = {}
    total = 0
    for entry in plan.expanded():
        shape = plan.shape_of(entry)
        size = math.prod(shape)
        total += size
        if len(shape) > 1 and plan.layouts[entry.layout].dim is None:
            module = starred(entry.name.rpartition(".")[0])
            short = module.rpartition("*.")[2].partition(".")[0] or module
            bytes_of[short] = bytes_of.get(short, 0) + size
    for module, size in sorted(bytes_of.items(), key=lambda one: -one[1]):
        if size >= total / 100:
            yield f"{module} {100 * size / total:.0f} %"


def _line(text: str) -> str:
    return " ".join(text.split())[:2000]


if __name__ == "__main__":
    main()
