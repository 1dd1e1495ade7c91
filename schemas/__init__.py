"""The contract between the planner and the runtime: JSON schemas, the documents they describe, interval arithmetic.

Imports nothing of ours outside this package, and no torch.
"""

if __name__ != "autotp_plan.schemas":
    raise ImportError("import autotp_plan.schemas, not the folder: a second import would make second copies of classes")
