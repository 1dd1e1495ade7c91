"""Checkpoints of a running job: the manifest of each, whether its files are what it says, and which are sound.

Nothing here opens a file of DeepSpeed's: bytes are compared with checksums, wherever neither torch nor DeepSpeed is.
"""
