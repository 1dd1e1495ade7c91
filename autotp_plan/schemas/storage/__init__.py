"""Bytes on disk: safetensors headers, checkpoint folders, byte ranges and their reader, checksums, and whether tensors
are what a plan says.

Not here: which bytes a rank needs (`schemas.layout`), and the folders that we write ourselves (`schemas.shards`).
"""
