"""Saving and resuming a job, on the same mesh or on another one, and writing its weights as a shards folder."""
