"""The contract between the planner and the runtime: JSON schemas, the documents they describe, interval arithmetic.

Imports nothing of ours outside this package, and no torch.
"""
