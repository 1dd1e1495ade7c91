"""Checkpoints whose weights are quantised: which formats are understood, and their weights computed as they are read.

What is above sees a checkpoint in bf16. numpy does the arithmetic, and is imported when the first weight is read.
"""
