"""Shards folders: the manifest, which tensor lies where, whether a folder is what it says, and how one is written so
that a stop leaves nothing half done.

Not here: where the bytes come from (`planner.shards` for files, `runtime.checkpoint.save_shards` for a running job).
"""
