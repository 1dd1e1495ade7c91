"""Rules: where they come from, which one decides a parameter, and the layout that follows.

Not here: the model (`planner.model`), and the plan as a document (`schemas.plan`).
"""
