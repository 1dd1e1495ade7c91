"""Data: which samples a rank trains on, text as tokens, and the check that TP ranks get the same batches.

Not here: the loop (`runtime.train`) and where a resumed job stands in its data (`runtime.checkpoint`).
"""
