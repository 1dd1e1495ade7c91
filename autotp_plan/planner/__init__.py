"""The offline planner: names and shapes in, a shard plan out. Never imports torch, transformers or deepspeed.

from autotp_plan.planner import compile_plan
plan = compile_plan(Path("checkpoint"), tp_size=4)
"""

from autotp_plan.planner.compiler import compile_plan
from autotp_plan.planner.model.inventory import Inventory, inventory_of_folder, inventory_of_module
from autotp_plan.planner.plan_checks import check_plan
from autotp_plan.planner.shards.merge import check_shards, merge
from autotp_plan.planner.shards.presplit import presplit
from autotp_plan.planner.shards.reshard import reshard
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.spec import SpecFile
from autotp_plan.sources.check_checkpoint import check_checkpoint

__all__ = [
    "Inventory",
    "Plan",
    "SpecFile",
    "check_checkpoint",
    "check_plan",
    "check_shards",
    "compile_plan",
    "inventory_of_folder",
    "inventory_of_module",
    "merge",
    "presplit",
    "reshard",
]
