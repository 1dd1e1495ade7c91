"""A shards folder: its manifest, which tensor lies where in its files, and whether it is what it says.

Not here: writing one (`planner.shards`, `runtime.checkpoint.save_shards`).
"""
