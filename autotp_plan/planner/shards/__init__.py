"""Copying tensors between checkpoints and shards folders: presplit, merge and reshard, in constant memory.

Not here: what a folder must hold, and how it is written and resumed (`schemas.shards`).
"""
