"""What one rank computes: tensor-parallel layers, their collectives, sharded parameters, the vocabulary-parallel loss.

Not here: reading weights (`runtime.loading`) and the DeepSpeed engine (`runtime.deepspeed`).
"""
