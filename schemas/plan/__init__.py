"""The plan document: its typed entries, how it is read, and everything in which a plan can contradict itself.

Not here: whether a plan fits a checkpoint (`schemas.storage`), a model (`runtime.loading`) or its own modules
(`planner.plan_checks`).
"""
