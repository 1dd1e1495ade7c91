"""Saving and resuming a job, on the same mesh or a different one, and writing its weights as a shards folder.

Not here: the private names of ZeRO that this relies on (`runtime.deepspeed.zero_internals`).
"""
