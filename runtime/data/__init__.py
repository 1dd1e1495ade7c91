"""Batches: the same on all TP ranks of a data-parallel group, others on each DP rank."""
