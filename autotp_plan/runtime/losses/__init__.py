"""What is computed from logits of which each rank has part of the words: losses, log-probabilities, entropies.

Here too is how a transformers model computes its loss this way. Not here: the layers themselves
(`runtime.tensor_parallel`).
"""
