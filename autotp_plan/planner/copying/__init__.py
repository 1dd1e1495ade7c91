"""Copying tensors between files as bytes, and comparing what was copied with the hub's checksums.

No command and no manifest: `planner.shards` says what is copied.
"""
