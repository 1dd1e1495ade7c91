"""What is advised, once the first ways are estimated in full."""

from __future__ import annotations

from autotp_plan.planner.estimate.advice import Advice, Wanted, Way, confirmed, sharded
from autotp_plan.planner.estimate.hardware import read_hardware
from autotp_plan.planner.estimate.step_time import Cluster, StepTime
from autotp_plan.schemas.estimate.document import Estimate, Part, RankEstimate
from autotp_plan.schemas.estimate.settings import Settings
from autotp_plan.schemas.plan.document import Plan
from tests.helpers.paths import PLANS

PLAN = Plan.read(PLANS / "llama_3_1_8b" / "tp4.json")
WANTED = Wanted(
    cluster=Cluster(gpus=16, per_node=8, hardware=read_hardware("h100")),
    memory=10**9,
    seq_length=4096,
    global_batch_size=16,
)


def way(stage: int, again: bool, seconds: float) -> Way:
    """By arithmetic; `seconds` are what it is thought to take."""
    time = StepTime(computing=seconds, tensor=0.0, data=0.0, hidden=0.0, optimizer=0.0)
    settings = Settings(dp_size=4, zero_stage=stage, activation_checkpointing=again)
    return Way(tp_size=4, settings=settings, peak=1, time=time)


FITS = tuple(way(stage, again, 10.0 + stage + 4 * again) for again in (False, True) for stage in range(4))


def test_the_first_three_are_the_fastest_when_all_is_known() -> None:
    """Stage 0 does not fit in full, and stage 1 takes far longer: each time the next one is tried."""
    asked = []

    def run(plan: Plan, settings: Settings) -> Estimate:
        asked.append((settings.zero_stage, settings.activation_checkpointing))
        peak = 2 * WANTED.memory if asked[-1] == (0, False) else 5
        operations = 10**18 if asked[-1] == (1, False) else 10**9
        rank = RankEstimate(
            tp_ranks=(0, 1, 2, 3), peak=peak, when="forward", at_peak=(Part(what="weights", bytes=peak),),
            forward_operations=operations,
        )  # fmt: skip
        return Estimate(
            model="", plan=plan.fingerprint, tp_size=4, settings=settings, measured=True, missing=(), ranks=(rank,)
        )

    found = confirmed(Advice(fits=FITS, too_large=()), {4: sharded(PLAN)}, WANTED, run)
    assert asked == [(0, False), (1, False), (2, False), (3, False), (0, True)]
    assert [one.settings.zero_stage for one in found.dropped] == [0]
    assert found.chosen == found.fits[:3], "nothing that is thought to be faster is left untried"
    assert all(one.estimate is not None and one.peak == 5 for one in found.chosen)
    assert len(found.fits) == len(FITS) - 1
    slow = next(one for one in found.fits if (one.settings.zero_stage, one.estimate is not None) == (1, True))
    assert found.fits[-1] == slow
