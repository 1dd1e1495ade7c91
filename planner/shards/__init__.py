"""Moving bytes between checkpoints and shards folders: presplit, merge and reshard, resumable and in constant memory.

Not here: what a finished folder must hold (`schemas.shards`).
"""
