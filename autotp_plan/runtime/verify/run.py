"""The proof of a plan: its twin, a small model of the same architecture, run dense and sharded and compared.

Starts the processes and gathers what they found; imports neither torch nor DeepSpeed itself. The proof shows that the
plan's layouts, module attributes and gradient sums are right for the architecture. It does not look at a checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.runtime.verify.report import Errors, Proof
from autotp_plan.runtime.verify.workers import RankError, run_ranks
from autotp_plan.schemas.errors import AutoTPError, Fault, MissingDependencyError
from autotp_plan.schemas.names import fold, starred
from autotp_plan.schemas.plan.document import Plan

ATTENTION = ("eager", "sdpa")
TWIN_SECONDS = 300.0
RANK_SECONDS = 900.0
_PACKAGES = ("autotp-plan", "torch", "transformers", "deepspeed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What is wrong with a plan: patterns of parameters whose partial gradients are not summed, and anything else.

    `ungraded` are patterns of parameters that have no gradient in any layer, of which nothing is proven.
    """

    partial_gradients: tuple[str, ...]
    problem: str | None
    ungraded: tuple[str, ...] = ()


def verify_plan(
    plan: Plan,
    *,
    attention: tuple[str, ...] = ATTENTION,
    optimizer: str = "adamw",
    progress: Callable[[str], None] = lambda _: None,
    factory: ModuleFactory | None = None,
) -> Proof:
    """Prove `plan` right or wrong, on CPU processes that this call starts.

    Args:
        plan: the plan of a transformers model, or of the factory's.
        attention: implementations to run. Those that the architecture does not have are left out, and named in the
            proof's `twin`.
        optimizer: that of the engine's steps: a class of torch.optim in any case (`adafactor`, `muon`), or the path of
            one (`transformers.Adafactor`).
        progress: called with a sentence before each part.
        factory: makes the model of a plan whose model is not from transformers; it has an attention of its own.

    Returns:
        The proof, which also says so when the plan is wrong.

    Raises:
        MissingDependencyError: torch, transformers or DeepSpeed is not installed.
        MismatchError: transformers cannot build the plan's model, or no small model of its architecture runs; the
            factory's model is another one, or there is nothing to run it on.
        OptionError: there is no such optimizer.
        AutoTPError: the small model could not be run at all, for lack of memory for example.
    """
    started = time.monotonic()
    versions = _versions()
    with tempfile.TemporaryDirectory(prefix="autotp-verify-") as name:
        folder = Path(name)
        progress("running a small model of the same architecture, unsharded")
        try:
            run_ranks(_write_twin, 1, plan, folder, attention, optimizer, factory, timeout=TWIN_SECONDS)
        except RankError as error:
            raise AutoTPError(_not_run(str(error))) from None
        twin = json.loads((folder / "about.json").read_text())
        progress(f"running it on {plan.tp_size} ranks: {', '.join(twin['attention'])}, DeepSpeed engine")
        failure = None
        try:
            run_ranks(_run_rank, plan.tp_size, folder, factory, timeout=RANK_SECONDS)
        except (RankError, AutoTPError) as error:
            failure = str(error)
        return Proof(
            plan=plan,
            twin=twin,
            float64=_gather_float64(folder, twin["attention"], plan.tp_size),
            engine=_gather_engine(folder, plan.tp_size),
            partial_gradients=tuple(_gather_partial(folder, twin["attention"])),
            operations=_gather_operations(folder, plan.tp_size),
            reads=_gather_reads(folder, twin["attention"]),
            failure=failure,
            versions=versions,
            seconds=time.monotonic() - started,
        )


def try_plan(plan: Plan, factory: ModuleFactory | None = None) -> Trial:
    """What is wrong about a guessed plan, for planning a model without a preset.

    Args:
        plan: the plan.
        factory: as for `verify_plan`.

    Returns:
        What to change; nothing when the plan is proven.

    Raises:
        AutoTPError: as `verify_plan`.
    """
    return trial_of(verify_plan(plan, factory=factory))


def trial_of(proof: Proof) -> Trial:
    """What is wrong by a proof: as `try_plan`."""
    partial = set(proof.partial_gradients)
    wrong = [name for name in proof.wrong if name not in partial]
    problem = proof.failure
    if problem is None and wrong:
        problem = f"{', '.join(fold(wrong)[:8])} differ from the unsharded model's"
    if problem is None and proof.reads:
        problem = proof.read_elsewhere()[0]
    if problem is None and not partial and not proof.proven:
        problem = f"off by {proof.float64_error:.1e} in float64, {proof.engine_error:.1e} in the DeepSpeed engine"
    graded = {starred(name) for kinds in proof.float64.values() for name in kinds.get("gradient", {})}
    unseen = {name for name in proof.twin["ungraded"] if starred(name) not in graded}
    return Trial(partial_gradients=_patterns(partial), problem=problem, ungraded=_patterns(unseen))


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Regexes of parameters that are called so in any layer."""
    return tuple(sorted({re.escape(starred(name)).replace(r"\*", r"\d+") + "$" for name in names}))


def _write_twin(
    plan: Plan, folder: Path, attention: tuple[str, ...], optimizer: str, factory: ModuleFactory | None
) -> None:
    from autotp_plan.runtime.verify.dense import write_twin
    from autotp_plan.runtime.verify.own_twin import write_own_twin

    if factory is None:
        write_twin(plan, folder, attention, optimizer)
    else:
        write_own_twin(plan, folder, factory, optimizer)


def _run_rank(folder: Path, factory: ModuleFactory | None) -> None:
    from autotp_plan.runtime.verify.own_twin import run_own_rank
    from autotp_plan.runtime.verify.sharded import run_rank

    if factory is None:
        run_rank(folder)
    else:
        run_own_rank(folder, factory)


def _gather_float64(folder: Path, attention: list[str], tp_size: int) -> dict[str, Errors]:
    """The largest of all ranks' errors, for each attention that every rank finished."""
    found: dict[str, Errors] = {}
    for kind in attention:
        ranks = [_read(folder / f"{kind}.rank-{rank}.json") for rank in range(tp_size)]
        if all(ranks):
            found[kind] = {
                what: {name: max(rank[what][name] for rank in ranks) for name in names}
                for what, names in ranks[0].items()
            }
    return found


def _gather_engine(folder: Path, tp_size: int) -> dict[str, float]:
    ranks = [_read(folder / f"engine.rank-{rank}.json") for rank in range(tp_size)]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]} if all(ranks) else {}


def _gather_reads(folder: Path, attention: list[str]) -> dict[str, str]:
    """The sharded weights that others read than their layers, and who; all ranks run the same code."""
    found = [_read(folder / f"{kind}.reads-0.json") for kind in attention]
    return {name: reader for reads in found for name, reader in sorted(reads.items())}


def _gather_operations(folder: Path, tp_size: int) -> tuple[int, ...]:
    """The floating-point operations of each rank's forward; nothing where not every rank came so far."""
    ranks = [_read(folder / f"compute.rank-{rank}.json") for rank in range(tp_size)]
    return tuple(rank["operations"] for rank in ranks) if all(ranks) else ()


def _gather_partial(folder: Path, attention: list[str]) -> list[str]:
    """The parameters whose gradients turned out to be partial; all ranks say the same."""
    found = [_read(folder / f"{kind}.partial-0.json").get("names", []) for kind in attention]
    return sorted({name for names in found for name in names})


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _versions() -> dict[str, str]:
    """Versions of what takes part in the proof. Raises MissingDependencyError."""
    missing = [name for name in (*_PACKAGES[1:], "accelerate", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            Fault(
                what="verify needs the runtime",
                where="installed packages",
                got=f"no {', '.join(missing)}",
                expected="torch, transformers, deepspeed, accelerate and safetensors",
                next="pip install 'autotp-plan[train]'",
            )
        )
    return {name: metadata.version(name) for name in _PACKAGES}


def _not_run(got: str) -> Fault:
    return Fault(
        what="the small model that stands for the plan's could not be run",
        where="verify",
        got=got,
        expected="a machine that can run a small model on its CPU",
        next="see whether memory or processes have run out; if not, please report it",
    )
