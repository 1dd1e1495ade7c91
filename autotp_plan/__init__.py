"""autotp-plan: a declarative sharding-plan compiler for tensor-parallel training under DeepSpeed.

    from autotp_plan import compile_plan, load_plan

    plan = compile_plan(Path("checkpoint"), tp_size=4)  # offline, without torch
    plan = load_plan("plan.json")  # in a training job

`schemas` are the documents that both sides share, `planner` works offline, `runtime` is one rank of a training job,
`huggingface` is what both need of transformers, `plans` are compiled plans of public models.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotp_plan.planner import compile_plan
    from autotp_plan.runtime import load_plan

__version__ = "0.1.0"
__all__ = ["__version__", "compile_plan", "load_plan"]


def __getattr__(name: str) -> Any:
    # neither half is imported before it is used: planning needs no torch, and importing the runtime takes seconds
    if name == "compile_plan":
        from autotp_plan.planner import compile_plan

        return compile_plan
    if name == "load_plan":
        from autotp_plan.runtime import load_plan

        return load_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
