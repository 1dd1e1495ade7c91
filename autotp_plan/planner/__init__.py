"""The offline planner: names and shapes in, a shard plan out. Never imports torch, transformers or deepspeed.

from autotp_plan.planner import compile_plan
plan = compile_plan(Path("checkpoint"), tp_size=4)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotp_plan.planner.compiler import compile_plan
    from autotp_plan.planner.model.inventory import Inventory, inventory_of_folder, inventory_of_module
    from autotp_plan.planner.plan_checks import check_plan
    from autotp_plan.planner.shards.convert import convert
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
    "convert",
    "inventory_of_folder",
    "inventory_of_module",
    "merge",
    "presplit",
    "reshard",
]

_MODULES = {
    "Inventory": "autotp_plan.planner.model.inventory",
    "Plan": "autotp_plan.schemas.plan.document",
    "SpecFile": "autotp_plan.schemas.spec",
    "check_checkpoint": "autotp_plan.sources.check_checkpoint",
    "check_plan": "autotp_plan.planner.plan_checks",
    "check_shards": "autotp_plan.planner.shards.merge",
    "compile_plan": "autotp_plan.planner.compiler",
    "convert": "autotp_plan.planner.shards.convert",
    "inventory_of_folder": "autotp_plan.planner.model.inventory",
    "inventory_of_module": "autotp_plan.planner.model.inventory",
    "merge": "autotp_plan.planner.shards.merge",
    "presplit": "autotp_plan.planner.shards.presplit",
    "reshard": "autotp_plan.planner.shards.reshard",
}
"""Where each name is: it is imported when it is first used, so that presplit does not wait for what compile needs."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
