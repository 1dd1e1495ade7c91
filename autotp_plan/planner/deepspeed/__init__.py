"""DeepSpeed's words: its JSON config read in, a plan written out as a `partition_config`, and what differs.

Not here: DeepSpeed's Python code, which the planner never imports.
"""
