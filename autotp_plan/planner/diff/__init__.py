"""What changed between two plans, or a plan and a checkpoint: pure functions from two documents to their differences.

Not here: reading files (the command line), and whether a plan is sound (`planner.plan_checks`).
"""
