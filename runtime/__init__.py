"""The runtime: loads one rank's part of a model by a plan and trains it under DeepSpeed.

from autotp_plan.runtime import load_plan

plan = load_plan("plan.json")
model = plan.load_model("shards/")
engine, optimizer, loader, scheduler = plan.initialize(model, config="ds_config.json", training_data=dataset)
"""

if __name__ != "autotp_plan.runtime":
    raise ImportError("import autotp_plan.runtime, not the folder: a second import would make second copies of classes")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotp_plan.runtime.training_plan import TrainingPlan, load_plan
    from autotp_plan.runtime.verify import try_plan, verify_plan

__all__ = ["TrainingPlan", "load_plan", "try_plan", "verify_plan"]


def __getattr__(name: str) -> Any:
    # importing DeepSpeed takes seconds and speaks: not before it is needed, so that a program can prepare for it
    if name in ("try_plan", "verify_plan"):
        from autotp_plan.runtime import verify

        return getattr(verify, name)
    if name in __all__:
        from autotp_plan.runtime import training_plan

        return getattr(training_plan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
