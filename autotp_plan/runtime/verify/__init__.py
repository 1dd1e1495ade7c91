"""The proof of a plan: a small model of the same architecture, its *twin*, is run dense and sharded and compared.

Here belong the twin, the passes and steps that both run, the comparison, and the ranks, which tests start too. What a
training job needs does not.
"""
