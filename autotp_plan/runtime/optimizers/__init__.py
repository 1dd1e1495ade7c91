"""Optimizers on a sharded model: which of them a shard is enough for, and how the others take their steps.

An optimizer that looks at a whole matrix or tensor (Muon, Adafactor, LAMB) would see one rank's shard of it. Here such
optimizers are found, and given the full tensors or refused; and the gradient norm of a user's own clipping is summed
over the TP ranks.

Not here: DeepSpeed's own clipping, and optimizer states in checkpoints (`runtime.checkpoint`).
"""
