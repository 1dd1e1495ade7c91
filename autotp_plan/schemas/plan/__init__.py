"""The plan document: its typed entries, how it is read and written, and in what its entries can contradict each other.

Not here: whether a plan fits a checkpoint (`schemas.storage`), a model (`runtime.loading`) or its own modules
(`planner.plan_checks`).
"""
