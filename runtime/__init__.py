"""The runtime: loads one rank's part of a model by a plan and trains it under DeepSpeed.

from autotp_plan.runtime import load_plan

plan = load_plan("plan.json")
model = plan.load_model("shards/")
engine, optimizer, loader, scheduler = plan.initialize(model, config="ds_config.json", training_data=dataset)
"""

if __name__ != "autotp_plan.runtime":
    raise ImportError("import autotp_plan.runtime, not the folder: a second import would make second copies of classes")

from autotp_plan.runtime.training_plan import TrainingPlan, load_plan

__all__ = ["TrainingPlan", "load_plan"]
