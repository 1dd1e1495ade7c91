"""Bytes on disk: safetensors headers, checkpoint folders, byte ranges, checksums.

Not here: which bytes a rank needs (`schemas.layout`), and the folders that we write ourselves (`schemas.shards`).
"""
